"""Engines: what they are, how they are named, which there are, and which one `auto` takes.

An engine is one function from a batch of noisy copies to logits. Everything else that a voter needs (noise, packing,
padding, counting, fingerprints) is in `batched.py`. A new engine is one module with `open_engines`, and one entry of
`options.ENGINES`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from macer_serve.base_classifier import BaseClassifier
from macer_serve.errors import EngineError, ParameterError
from macer_serve.hardware import has_gpu, multiplies_int8
from macer_serve.smoothing.noise import Noise
from macer_serve.voters.copies import CopySource
from macer_serve.voters.options import DEVICES, ENGINES, PRECISIONS, VoterOptions

log = logging.getLogger(__name__)

Copies = Any  # an array, or rows of a buffer of the engine's `CopySource`
Logits = npt.NDArray[np.float32]
PlainLogits = Callable[[npt.NDArray[np.float32]], Logits]  # see `Engine.plain_logits`


@dataclass(frozen=True, slots=True)
class Passes:
    """The forward passes of a voter: `shape` (H, W, C) of the copies, their noise, batch sizes, workers.

    `batch_sizes` ascend; `workers` threads run one pass each at a time.
    """

    shape: tuple[int, int, int]
    noise: Noise
    batch_sizes: tuple[int, ...]
    workers: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the copies."""
        return self.noise.dtype

    @property
    def scale(self) -> float:
        """Pixel values are copies * scale."""
        return self.noise.scale


class Engine(Protocol):
    """One way to run a base classifier, warmed up at every batch size before it votes.

    `precision` and `compiled` are part of its name, as is `build`: the digest of a compiled file that another build
    of the same graph need not reproduce. `tolerance` bounds the relative error that its arithmetic explains, see
    `macer_serve.base_classifier.relative_error`. `source` makes the noisy copies on the engine's device; None if the
    host makes them.
    """

    device: str
    precision: str
    compiled: bool
    build: str | None
    tolerance: float
    source: CopySource | None

    def start_thread(self) -> None:
        """Prepare the calling thread; called once by each worker thread before its first pass."""
        ...

    def logits(self, copies: Copies) -> Logits:
        """Returns the logits `[batch, classes]` of copies `[batch, H, W, C]`, `batch` being one of the batch sizes.

        The copies are an array, or rows of a buffer of `source`. Called by worker threads, several at a time. Raises
        `EngineError` if the function would be another one than at warm-up.
        """
        ...

    def plain_logits(self, pixels: npt.NDArray[np.float32]) -> Logits:
        """Returns the logits of pixels `[k, C, H, W]` by the plain form of the classifier, in fp32."""
        ...

    def seal(self) -> None:
        """End the warm-up: from now on `logits` must stay the same function, or raise."""
        ...


@dataclass(frozen=True, slots=True)
class EngineName:
    """An engine's name in certificates, such as `torch-cpu-bf16-compiled-b256:9f3a05c2d1e47b86`.

    Two voters of one name compute the same function: `fingerprint` is the digest of the logits of a probe batch of
    `batch` copies. `noise` names what draws the copies, if the host does not. Raises `ParameterError` for parts that
    could not be read back.
    """

    engine: str
    device: str
    precision: str
    batch: int
    fingerprint: str
    compiled: bool = False
    build: str | None = None
    noise: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(str(self)):
            raise ParameterError(f"not the name of an engine: {str(self)[:100]!r}")

    def __str__(self) -> str:
        parts = [self.engine, self.device, self.precision, *(["compiled"] if self.compiled else [])]
        built = [f"build{self.build}"] if self.build is not None else []
        drawn = [f"noise{self.noise}"] if self.noise is not None else []
        return "-".join([*parts, *built, *drawn, f"b{self.batch}"]) + f":{self.fingerprint}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the name that `str` printed. Raises `ParameterError` for anything else."""
        found = _NAME.fullmatch(text)
        if found is None:
            raise ParameterError(f"not the name of an engine: {text[:100]!r}")
        engine, device, precision, compiled, build, noise, batch, fingerprint = found.groups()
        return cls(engine, device, precision, int(batch), fingerprint, compiled is not None, build, noise)

    def options(self) -> VoterOptions:
        """Returns the options that make an engine of this name, if this machine has one.

        Raises `ParameterError` for an engine that this version does not know, or a batch that it does not allow.
        """
        return VoterOptions(
            engine=self.engine,
            device=self.device,  # type: ignore[arg-type]  # checked at construction
            precision=self.precision,  # type: ignore[arg-type]
            batch=self.batch,
            compile=self.compiled,
        )


_NAME = re.compile(
    rf"([a-z][a-z0-9_]{{0,31}})-({'|'.join(DEVICES)})-({'|'.join(PRECISIONS[1:])})(-compiled)?"
    r"(?:-build([0-9a-f]{8,64}))?(?:-noise([a-z]{1,16}))?-b([1-9][0-9]{0,4}):([0-9a-f]{16})"
)


def choose(classifier: BaseClassifier, options: VoterOptions) -> VoterOptions:
    """Returns the options with engine and device decided, by hardware and files alone.

    A GPU runs torch. A CPU that multiplies int8 runs the checkpoint's quantised file, if there is one, by OpenVINO.
    Every other CPU runs torch, or onnxruntime if the checkpoint is an ONNX graph. `results/engines.md` has the
    measurements.
    """
    device = options.device or ("cuda" if has_gpu() else "cpu")
    if options.engine == "openvino" and options.precision == "auto":
        return replace(options, device=device, precision="fp32" if classifier.int8 is None else "int8")
    if options.engine != "auto":
        return replace(options, device=device)
    engine, precision = "torch" if classifier.load_module is not None else "onnx", options.precision
    if device == "tensorrt":
        engine = "onnx"
    elif device == "cpu" and precision == "int8":
        engine = "openvino" if _installed("openvino") else "onnx"
    elif device == "cpu" and precision == "auto" and classifier.int8 is not None and multiplies_int8():
        if _installed("openvino"):
            engine, precision = "openvino", "int8"
        else:
            log.warning("OpenVINO is not installed: the checkpoint's int8 file is left aside, votes will be slower")
    return replace(options, engine=engine, device=device, precision=precision)


def open_engines(classifier: BaseClassifier, options: VoterOptions, passes: Passes) -> Iterator[Engine]:
    """Yields the engine that `options` name in its variants, the fastest first, each a fallback of the one before.

    Raises `EngineError` if a package or the hardware is missing.
    """
    try:
        module: Any = importlib.import_module(ENGINES[options.engine])
    except ModuleNotFoundError as error:
        package = (error.name or "?").partition(".")[0]
        raise EngineError(
            f"engine {options.engine} needs the package {package}, which is not installed: pip install {package}"
        ) from error
    yield from module.open_engines(classifier, options, passes)


def require(options: VoterOptions, *, devices: tuple[str, ...], precisions: tuple[str, ...]) -> None:
    """Raise `EngineError` unless an engine's devices and precisions hold those that were asked for."""
    if options.device not in devices:
        raise EngineError(f"the engine {options.engine} runs on {' or '.join(devices)}, not on {options.device}")
    if options.precision not in ("auto", *precisions):
        raise EngineError(f"the engine {options.engine} computes in {', '.join(precisions)}, not {options.precision}")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
