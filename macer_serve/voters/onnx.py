"""The onnx engine: an ONNX graph on onnxruntime, by its CPU, CUDA or TensorRT provider.

One session per batch size, static shapes, no algorithm chosen by a timing, no TF32. TensorRT does choose by timings
when it builds: the built file is kept, and its digest stands in the engine's name.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from macer_serve.base_classifier import BaseClassifier
from macer_serve.errors import EngineError
from macer_serve.onnx_graph import COPIES, LOGITS, PIXELS, with_copies
from macer_serve.voters.copies import device_copies
from macer_serve.voters.engines import Copies, Logits, Passes, PlainLogits, require
from macer_serve.voters.options import VoterOptions

# Of `relative_error`. int8 rounds in other places than the unoptimised graph, which is compared with.
TOLERANCE = {"fp32": 1e-3, "int8": 0.5}
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_NEEDED = {
    "cuda": "the package onnxruntime-gpu, an NVIDIA driver, and the CUDA and cuDNN libraries that torch's wheels bring",
    "tensorrt": "the package onnxruntime-gpu, an NVIDIA driver, and TensorRT (the package tensorrt)",
}


def open_engines(classifier: BaseClassifier, options: VoterOptions, passes: Passes) -> Iterator[OnnxEngine]:
    """Yields the one engine that the options name. Raises `EngineError` if its provider cannot be had."""
    require(options, devices=tuple(PROVIDERS), precisions=("fp32", "int8"))
    precision = "int8" if options.precision == "int8" else "fp32"
    graph = classifier.int8_graph() if precision == "int8" else classifier.graph()
    yield OnnxEngine(graph, plain_graph(classifier, precision, graph), options.device or "cpu", precision, passes)


class OnnxEngine:
    """The logits of an ONNX graph; see `macer_serve.voters.engines.Engine`."""

    compiled = False

    def __init__(self, graph: bytes, plain: PlainLogits, device: str, precision: str, passes: Passes) -> None:
        self.device, self.precision, self.tolerance = device, precision, TOLERANCE[precision]
        self.source = device_copies(passes.noise, passes.shape, device)
        self._plain = plain
        wrapped = with_copies(graph, passes.shape, passes.scale, integers=passes.dtype.kind == "i")
        cache = _cache_folder(wrapped) if device == "tensorrt" else None
        self._sessions = {size: _session(wrapped, device, size, cache) for size in passes.batch_sizes}
        self._cache = cache
        self.build: str | None = None

    def start_thread(self) -> None:
        pass

    def logits(self, copies: Copies) -> Logits:
        session = self._sessions[len(copies)]
        on_host = isinstance(copies, np.ndarray)
        try:
            if self.device == "cpu" and on_host:
                return session.run([LOGITS], {COPIES: np.ascontiguousarray(copies)})[0]  # type: ignore[no-any-return]
            binding = session.io_binding()
            if on_host:
                binding.bind_cpu_input(COPIES, np.ascontiguousarray(copies))
            else:
                _bind(binding, copies)
            binding.bind_output(LOGITS, "cpu")
            session.run_with_iobinding(binding)
            return binding.get_outputs()[0].numpy()  # type: ignore[no-any-return]
        except Exception as error:  # onnxruntime's own errors, of many classes
            raise EngineError(f"onnxruntime cannot run this graph: {error}") from error

    def plain_logits(self, pixels: npt.NDArray[np.float32]) -> Logits:
        return self._plain(pixels)

    def seal(self) -> None:
        """Read what TensorRT has built while it was warmed up."""
        if self._cache is not None:
            self.build = _digest_of_files(self._cache, "*.engine")


def _bind(binding: Any, copies: Any) -> None:
    """Gives a session copies where they lie, rows of a torch tensor, when their device has written them."""
    place = copies.device
    if place.type == "cuda":
        import torch

        torch.cuda.current_stream(place).synchronize()  # onnxruntime runs on a stream of its own
    binding.bind_input(COPIES, place.type, place.index or 0, np.int16, tuple(copies.shape), copies.data_ptr())


class PlainGraph:
    """A graph's logits by onnxruntime's CPU provider, no operation fused or reordered."""

    def __init__(self, graph: bytes) -> None:
        self._session = open_session(graph, session_options(optimise=False), ["CPUExecutionProvider"])

    def __call__(self, pixels: npt.NDArray[np.float32]) -> Logits:
        try:
            logits = self._session.run([LOGITS], {PIXELS: pixels})[0]
        except Exception as error:
            raise EngineError(f"the ONNX graph cannot be run on inputs {list(pixels.shape)}: {error}") from error
        return np.asarray(logits, dtype=np.float32)


def plain_graph(classifier: BaseClassifier, precision: str, graph: bytes) -> PlainLogits:
    """Returns what an engine of a graph is compared with: the module it was exported from, or the graph itself."""
    if precision == "fp32" and classifier.load_module is not None:
        from macer_serve.voters.torch import plain_logits

        return functools.partial(plain_logits, classifier.module())
    return PlainGraph(graph)


def open_session(graph: bytes, options: Any, providers: list[Any]) -> Any:
    """Returns an onnxruntime session. Raises `EngineError` for a graph that onnxruntime refuses."""
    try:
        return onnxruntime.InferenceSession(graph, options, providers=providers)
    except Exception as error:
        raise EngineError(f"onnxruntime cannot load this graph: {error}") from error


def session_options(*, optimise: bool = True, batch: int | None = None) -> Any:
    """Returns options for one thread per pass, silent, and a batch dimension fixed to `batch` if it is given."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; a provider that is missing is found below
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # one thread per pass, one pass per worker
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    return options


def _session(graph: bytes, device: str, batch: int, cache: Path | None) -> Any:
    """Returns a session whose first provider is the device's. Raises `EngineError` if onnxruntime fell back."""
    provider = PROVIDERS[device]
    if device != "cpu" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the libraries that torch's wheels brought
    fixed = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
    by_device: dict[str, list[Any]] = {
        "cpu": [provider],
        "cuda": [(provider, fixed), PROVIDERS["cpu"]],
        "tensorrt": [
            (provider, {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}),
            (PROVIDERS["cuda"], fixed),
            PROVIDERS["cpu"],
        ],
    }
    # Asked for a provider that is not built in, onnxruntime warns and goes on; one that cannot start is left out.
    session = open_session(graph, session_options(batch=batch), by_device[device])
    if session.get_providers()[0] != provider:
        raise EngineError(
            f"onnxruntime fell back to {session.get_providers()[0]} from {provider}; device {device} needs "
            f"{_NEEDED[device]}"
        )
    return session


def _cache_folder(graph: bytes) -> Path:
    """Returns the folder of the engine files that TensorRT builds of this graph, by onnxruntime's version."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(onnxruntime.__version__.encode() + b"\0" + graph).hexdigest()[:32]
    folder = base / "macer-serve" / "tensorrt" / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest_of_files(folder: Path, pattern: str) -> str:
    """Returns 16 hex digits of the contents of the files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
