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

from macer_serve import __version__
from macer_serve.checkpoint.config import CheckpointConfig, digest_of
from macer_serve.checkpoint.folder import load_model
from macer_serve.errors import CheckpointError, EngineError, EngineMismatchError
from macer_serve.onnx_graph import LOGITS, PIXELS, export_graph

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1
PROBE_BATCHES = (1, 3)
TOLERANCE = 2e-5  # of a probe batch's largest logit; every architecture was seen within 1e-6 (two fp32 engines)


def export_onnx(checkpoint: str | Path, out: str | Path) -> str:
    """Writes `out` whole or not at all, replacing what is there; returns the file's digest, `sha256:...`.

    The file is validated and compared with torch before it is put in place. Raises `CheckpointError`, `EngineError` if
    torch cannot export the network, `EngineMismatchError` if the logits differ.
    """
    config, model = load_model(checkpoint)
    out = Path(out)
    data = _onnx_bytes(config, model)
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
            require_same_logits(staging, model, config)
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


def _onnx_bytes(config: CheckpointConfig, model: nn.Module) -> bytes:
    """Returns the file of the model with its metadata, the same bytes whenever torch writes the same graph."""
    import onnx

    proto: Any = export_graph(model, config.input_shape)
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


def require_same_logits(file: Path, model: nn.Module, config: CheckpointConfig) -> None:
    """Raises `EngineMismatchError` unless onnxruntime's logits of `file` are torch's on noisy probe images.

    They may differ by `TOLERANCE` times the largest logit of the batch.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for batch in PROBE_BATCHES:
        pixels = _probe(batch, config)
        with torch.inference_mode():
            expected = model(pixels)
        logits = torch.from_numpy(session.run([LOGITS], {PIXELS: pixels.numpy()})[0])
        allowed = TOLERANCE * expected.abs().max()
        same = logits.shape == expected.shape and bool(((logits - expected).abs() <= allowed).all())
        if not same:  # nor is nan the same as anything
            raise EngineMismatchError(
                f"onnxruntime and torch do not compute the same logits for {batch} probe image(s): "
                f"they differ by more than {float(allowed):.2g}"
            )


def _probe(batch: int, config: CheckpointConfig) -> Tensor:
    """Returns images such as the base classifier sees: 8-bit pixels under noise, beyond [0, 1] too."""
    import torch

    generator = torch.Generator().manual_seed(batch)
    shape = (batch, *config.input_shape)
    pixels = torch.randint(256, shape, generator=generator) / 255
    return pixels + config.sigma * torch.randn(shape, generator=generator)
