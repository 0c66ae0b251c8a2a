"""The first run of an ONNX graph from elsewhere, within bounds on memory and time.

A few bytes of a graph can ask for any amount of either, by operators whose sizes are computed only when they run.
onnxruntime refuses allocations beyond its arena's limit, and stops between two operators when it is told to.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from macer_serve.errors import CheckpointError, EngineError, first_line
from macer_serve.onnx_graph import PIXELS, reason_to_refuse

MAX_MEMORY = 4 * 2**30  # bytes of intermediate values; a ResNet-50 takes 0.03 GiB per image of 224 x 224
MAX_SECONDS = 300.0  # per run of a few images

Floats = npt.NDArray[np.float32]


def require_runnable(graph: bytes, input_shape: tuple[int, int, int], path: Path) -> None:
    """Raise `CheckpointError` unless a graph of ours needs no other file, and runs on one image within the bounds."""
    import onnx

    try:
        model: Any = onnx.load_model_from_string(graph)
    except Exception as error:  # protobuf's own errors
        raise CheckpointError(f"{path} is not an ONNX file: {first_line(error)}") from error
    if reason := reason_to_refuse(model):
        raise CheckpointError(f"{path} is refused: {reason}")
    try:
        open_bounded(graph, PIXELS)(np.zeros((1, *input_shape), np.float32))
    except EngineError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def open_bounded(graph: bytes, name: str) -> Callable[[Floats], Any]:
    """Returns the function of a graph whose input is `name`, by onnxruntime on the CPU without optimisations.

    It and its function raise `EngineError` with onnxruntime's message, also beyond `MAX_MEMORY` and `MAX_SECONDS`.
    """
    import onnxruntime

    _register_arena(MAX_MEMORY)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    # The arena keeps its memory for later runs; weights, which are bounded by the file, would stay in it for ever.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(f"onnxruntime cannot load this graph: {first_line(error)}") from error

    def run(pixels: Floats) -> Any:
        settings = onnxruntime.RunOptions()
        settings.log_severity_level = 4
        timer = threading.Timer(MAX_SECONDS, setattr, (settings, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            return session.run(None, {name: pixels}, settings)[0]
        except Exception as error:
            where = f"onnxruntime cannot run this graph on inputs {list(pixels.shape)}"
            if settings.terminate:
                raise EngineError(f"{where} within {MAX_SECONDS:g} s") from error
            if "arena" in str(error):
                raise EngineError(f"{where}: its values need more than {MAX_MEMORY / 2**30:g} GiB") from error
            raise EngineError(f"{where}: {first_line(error)}") from error
        finally:
            timer.cancel()

    return run


@functools.cache  # onnxruntime has one such arena per process
def _register_arena(limit: int) -> None:
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(limit, 1, -1, -1))
