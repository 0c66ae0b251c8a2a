"""int8: a checkpoint's base classifier with quantised convolutions and matrix products, as one ONNX file.

Static quantisation by onnxruntime (QDQ form, unsigned 8-bit activations, signed 8-bit weights per output channel).
Scales are fixed by a calibration on noisy images, so that a copy's logits never depend on its batch. The last layer
stays in fp32: rounded logits would tie. The quantised network is another base classifier than the fp32 one, and its
certificates are about itself; `disagreement` says how often the two differ.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from macer_serve.checkpoint.config import INT8, CheckpointConfig
from macer_serve.checkpoint.folder import load_checkpoint, read_file, resolve, write_checkpoint
from macer_serve.errors import EngineError, first_line
from macer_serve.locks import locked
from macer_serve.onnx_graph import LOGITS, PIXELS

Pixels = npt.NDArray[np.float32]

# Activations beyond this percentile of the calibration are clipped. On 4,000 noisy test images of CIFAR-10 the bundled
# network's class changed on 0.7 %; on 1.2 % without clipping, and at 99.99.
PERCENTILE = 99.999
_BATCH = 16
_WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def calibration_size(input_shape: tuple[int, int, int]) -> int:
    """Returns how many noisy images a calibration takes: all their activations are held in memory at once."""
    return int(np.clip(2**22 // np.prod(input_shape), 32, 1024))


def quantize_checkpoint(
    checkpoint: str | Path, calibration: Pixels, held_out: Pixels, *, source: dict[str, Any]
) -> CheckpointConfig:
    """Writes the checkpoint's int8 file beside its other files; returns the new configuration.

    `calibration` and `held_out` are noisy copies `[k, C, H, W]`, pixel values; `source` says where they came from, for
    the record. An int8 file that is there is replaced. Raises `CheckpointError`, `EngineError`, and
    `OutputError` for a checkpoint that cannot be written or is being written.
    """
    import onnxruntime

    folder = resolve(checkpoint)
    with locked(folder):
        config, classifier = load_checkpoint(checkpoint)
        kept = {name: read_file(folder, config, name) for name in config.files if name != INT8}
        graph = classifier.graph()
        int8 = quantize_graph(graph, calibration)
        record = {
            **source,
            "method": "onnxruntime static QDQ, per channel, u8 activations, s8 weights, last layer fp32",
            "percentile": PERCENTILE,
            "calibration_images": len(_whole_batches(calibration)),
            "held_out_images": len(held_out),
            "disagreement": round(disagreement(graph, int8, held_out), 6),
            "onnxruntime": onnxruntime.__version__,
        }
        return write_checkpoint(replace(config, quantization=record), {**kept, INT8: int8}, folder)


def quantize_graph(graph: bytes, calibration: Pixels) -> bytes:
    """Returns the int8 form of an fp32 graph. Raises `EngineError` for a graph with nothing to quantise."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._batches = _batches(_whole_batches(calibration))

        def get_next(self) -> dict[str, Pixels] | None:
            return next(({PIXELS: batch} for batch in self._batches), None)

    with tempfile.TemporaryDirectory() as folder, _silent():
        given, prepared, quantised = (Path(folder, name) for name in ("fp32.onnx", "prepared.onnx", "int8.onnx"))
        given.write_bytes(graph)
        try:
            # Batch normalisation is folded, shapes are inferred.
            quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
            last = _last_layers(onnx.load(prepared).graph)
            quantize_static(
                str(prepared),
                str(quantised),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=last,
                calibrate_method=CalibrationMethod.Percentile,
                extra_options={"CalibPercentile": PERCENTILE},
            )
        except Exception as error:  # onnxruntime's tools raise errors of many kinds
            raise EngineError(f"this graph cannot be quantised: {first_line(error)}") from error
        model = onnx.load(quantised)
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise EngineError("this graph has nothing to quantise: no convolution or matrix product but its last layer")
    for node in model.graph.node:
        node.ClearField("doc_string")
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def disagreement(graph: bytes, int8: bytes, pixels: Pixels) -> float:
    """Returns the share of the noisy copies `[k, C, H, W]` whose class the two graphs do not agree on."""
    first, second = (_classes(data, pixels) for data in (graph, int8))
    return float(np.mean(first != second))


def _classes(graph: bytes, pixels: Pixels) -> npt.NDArray[np.intp]:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([LOGITS], {PIXELS: batch})[0].argmax(1) for batch in _batches(pixels)])


def _whole_batches(pixels: Pixels) -> Pixels:
    """Returns the pixels without a short last batch, which onnxruntime's histograms cannot hold beside the others."""
    return pixels[: len(pixels) // _BATCH * _BATCH] if len(pixels) > _BATCH else pixels


def _batches(pixels: Pixels) -> Iterator[Pixels]:
    return (pixels[at : at + _BATCH] for at in range(0, len(pixels), _BATCH))


def _last_layers(graph: Any) -> list[str]:
    """Returns the names of the nodes from the last weighted layers to the output."""
    producers = {output: node for node in graph.node for output in node.output}
    names, waiting = [], [LOGITS]
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.name in names:
            continue
        names.append(node.name)
        if node.op_type not in _WEIGHTED:
            waiting += node.input
    return names


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silences onnxruntime's calibration: it prints progress, and logs advice that this module follows already."""
    import logging

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
