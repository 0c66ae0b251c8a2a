"""A checkpoint's base classifier as one ONNX file. Its metadata say what inputs and outputs mean.

Input `pixels` `[batch, C, H, W]` and output `logits` `[batch, classes]`, both fp32. Pixel values are in [0, 1] and the
normalisation is in the graph, so that sigma is in pixel values there too; noise is added to `pixels`, unclipped.
The file's metadata: see `metadata`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from macer_serve.atomic_writes import atomic_file
from macer_serve.checkpoint.config import CheckpointConfig, digest_of
from macer_serve.checkpoint.folder import load_checkpoint
from macer_serve.checkpoint.same_logits import require_same_logits
from macer_serve.errors import EngineError, first_line
from macer_serve.locks import locked
from macer_serve.onnx_graph import export_graph
from macer_serve.version import __version__

FORMAT = 1


def export_onnx(checkpoint: str | Path, out: str | Path) -> str:
    """Writes `out` whole or not at all, replacing what is there; returns the file's digest, `sha256:...`.

    The graph is validated, and compared with torch, before it is written. If the checkpoint is an ONNX graph, the file
    is that graph with metadata. Raises `CheckpointError`, `OutputError` for a place that cannot be written or is being
    written, `EngineError` if torch cannot export the network, `EngineMismatchError` if the logits differ.
    """
    out = Path(out)
    with locked(out):
        config, classifier = load_checkpoint(checkpoint)
        model = None if classifier.load_module is None else classifier.module()
        data = _onnx_bytes(config, classifier.graph() if model is None else export_graph(model, config.input_shape))
        _require_valid(data)
        if model is not None:
            require_same_logits(data, model, config.input_shape, config.sigma)
        with atomic_file(out) as file:
            file.write(data)
    return digest_of(data)


def metadata(config: CheckpointConfig) -> dict[str, str]:
    """Returns the file's `metadata_props`: `name` and `checkpoint` (its digest) as they are, the rest as JSON.

    Uploads are brought to a short side of `resize`, then cropped to `input_shape` (C, H, W); see `images.py`.
    """
    values = {
        "macer_format": FORMAT,
        "sigma": config.sigma,
        "classes": config.classes,
        "input_shape": config.input_shape,
        "resize": config.resize,
    }
    told = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return {**told, "name": config.name, "checkpoint": config.digest}


def _onnx_bytes(config: CheckpointConfig, graph: Any) -> bytes:
    """Returns the file of a graph (bytes or proto) with the metadata, the same bytes for the same graph."""
    import onnx

    proto: Any = onnx.load_model_from_string(graph) if isinstance(graph, bytes) else graph
    proto.producer_name, proto.producer_version = "macer-serve", __version__
    onnx.helper.set_model_props(proto, metadata(config))
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _require_valid(graph: bytes) -> None:
    import onnx

    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"torch's exporter wrote an invalid graph: {first_line(error)}") from error
