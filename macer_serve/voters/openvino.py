"""The openvino engine: an ONNX graph on OpenVINO's CPU plugin, in fp32 or in the int8 of its quantised form.

One stream and one thread per worker, static shapes. The f32 hint keeps what is not quantised in fp32; quantised
operations run as true int8 all the same.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from macer_serve.base_classifier import BaseClassifier
from macer_serve.errors import EngineError
from macer_serve.onnx_graph import with_copies
from macer_serve.voters.engines import Copies, Logits, Passes, PlainLogits, require
from macer_serve.voters.onnx import TOLERANCE, plain_graph
from macer_serve.voters.options import VoterOptions


def open_engines(classifier: BaseClassifier, options: VoterOptions, passes: Passes) -> Iterator[OpenVinoEngine]:
    """Yields the one engine that the options name. Raises `EngineError` for a graph that OpenVINO refuses."""
    require(options, devices=("cpu",), precisions=("fp32", "int8"))
    precision = "int8" if options.precision == "int8" else "fp32"
    graph = classifier.int8_graph() if precision == "int8" else classifier.graph()
    yield OpenVinoEngine(graph, plain_graph(classifier, precision, graph), precision, passes)


@functools.cache
def _core() -> openvino.Core:
    """Returns the one `Core` of this process, which is never closed.

    On a CPU with AMX each `Core` gives its thread a new stack for signals, and frees that stack when it is closed. If
    another thread closes it, or a younger `Core` is closed after it, the thread is left with a freed stack. The next
    signal, such as Ctrl-C or the end of a child process, then ends the process.
    """
    return openvino.Core()


class OpenVinoEngine:
    """The logits of an ONNX graph; see `macer_serve.voters.engines.Engine`."""

    device, compiled, build, source = "cpu", False, None, None

    def __init__(self, graph: bytes, plain: PlainLogits, precision: str, passes: Passes) -> None:
        self.precision, self.tolerance = precision, TOLERANCE[precision]
        self._plain, self._requests = plain, threading.local()
        wrapped = with_copies(graph, passes.shape, passes.scale, integers=passes.dtype.kind == "i")
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": passes.workers,
            "INFERENCE_NUM_THREADS": passes.workers,
            "ENABLE_CPU_PINNING": False,  # other replicas may share the cores
        }
        core = _core()
        try:
            self._compiled = {}
            for size in passes.batch_sizes:
                model = core.read_model(io.BytesIO(wrapped))
                model.reshape([size, *passes.shape])
                self._compiled[size] = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load this graph: {str(error).strip()}") from error

    def start_thread(self) -> None:
        self._requests.by_size = {size: model.create_infer_request() for size, model in self._compiled.items()}

    def logits(self, copies: Copies) -> Logits:
        request = self._requests.by_size[len(copies)]
        copies = np.ascontiguousarray(copies)  # the request reads its memory, and does not keep it alive
        request.set_input_tensor(openvino.Tensor(copies, shared_memory=True))
        try:
            request.infer()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot run this graph: {str(error).strip()}") from error
        return np.array(request.get_output_tensor().data, dtype=np.float32)

    def plain_logits(self, pixels: npt.NDArray[np.float32]) -> Logits:
        return self._plain(pixels)

    def seal(self) -> None:
        pass
