"""A checkpoint's base classifier as one ONNX file that says by itself what it means.

Input `pixels` `[batch, C, H, W]` and output `logits` `[batch, classes]`, both fp32. Pixel values are in [0, 1] and the
normalisation is in the graph, so that sigma is in pixel values there too; noise is added to `pixels`, unclipped.
The file's metadata: see `metadata`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from macer_serve.base_classifier import SAME, error_of_batch, probe_pixels
from macer_serve.checkpoint.config import CheckpointConfig, digest_of
from macer_serve.checkpoint.folder import load_checkpoint
from macer_serve.errors import CheckpointError, EngineError, EngineMismatchError
from macer_serve.onnx_graph import LOGITS, PIXELS, export_graph
from macer_serve.version import __version__

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
PROBE_BATCHES = (1, 3)


def export_onnx(checkpoint: str | Path, out: str | Path) -> str:
    """Writes `out` whole or not at all, replacing what is there; returns the file's digest, `sha256:...`.

    The file is validated, and compared with torch, before it is put in place. A checkpoint that is an ONNX graph only
    gets metadata. Raises `CheckpointError`, `EngineError` if torch cannot export the network, `EngineMismatchError` if
    the logits differ.
    """
    config, classifier = load_checkpoint(checkpoint)
    model = None if classifier.load_module is None else classifier.module()
    out = Path(out)
    data = _onnx_bytes(config, classifier.graph() if model is None else export_graph(model, config.input_shape))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
        staging = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _require_valid(staging)
            if model is not None:
                require_same_logits(staging, model, config.input_shape, config.sigma)
            staging.chmod(0o644)
            staging.replace(out)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
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


def _require_valid(file: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"torch's exporter wrote an invalid graph: {error}") from error


def require_same_logits(
    graph: Path | bytes, model: nn.Module, input_shape: tuple[int, int, int], sigma: float
) -> npt.NDArray[np.float32]:
    """Returns the logits of a probe batch. Raises `EngineMismatchError` unless onnxruntime's are torch's.

    `graph` is a file or its bytes; the probe is noise of `sigma` on random pixels. Each class is compared on its own
    scale, see `macer_serve.base_classifier.relative_error`.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    source = graph if isinstance(graph, bytes) else str(graph)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    pixels = probe_pixels(max(PROBE_BATCHES), input_shape, sigma)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    for batch in PROBE_BATCHES:
        logits: npt.NDArray[np.float32] = session.run([LOGITS], {PIXELS: pixels[:batch]})[0]
        error = (
            error_of_batch(logits, expected)
            if logits.shape[:1] == np.atleast_1d(expected)[:batch].shape[:1]
            else np.inf
        )
        if error > SAME:
            raise EngineMismatchError(
                f"onnxruntime and torch do not compute the same logits for {batch} probe image(s): a class's differ "
                f"by {error:.2g} of how much they vary, and {SAME:g} is allowed"
            )
    return logits
