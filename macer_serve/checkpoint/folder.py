"""Reading and writing checkpoint folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from macer_serve.checkpoint.config import CheckpointConfig
from macer_serve.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BUNDLED = Path(__file__).resolve().parent.parent / "bundled"


def resolve(checkpoint: str | Path) -> Path:
    """The checkpoint's folder: `bundled:NAME` or a path. Raises `CheckpointError` where there is none."""
    text = str(checkpoint)
    path = BUNDLED / text.removeprefix("bundled:") if text.startswith("bundled:") else Path(text).expanduser()
    if not (path / CONFIG).is_file():
        bundled = ", ".join(f"bundled:{p.name}" for p in sorted(BUNDLED.glob("*/")) if (p / CONFIG).is_file())
        raise CheckpointError(
            f"{path} is not a checkpoint: no {CONFIG} in it. Name a folder written by 'macer train', "
            f"or one of: {bundled or 'none is bundled'}"
        )
    return path


def load_config(checkpoint: str | Path) -> CheckpointConfig:
    """The configuration alone, for those who never run the network. Raises `CheckpointError`."""
    path = resolve(checkpoint) / CONFIG
    try:
        return CheckpointConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_model(checkpoint: str | Path) -> tuple[CheckpointConfig, nn.Sequential]:
    """The configuration and the base classifier in eval mode, pixel values in [0, 1] -> logits.

    Raises `CheckpointError` where the weights are not those whose digest the configuration names.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from macer_serve.architectures import base_classifier

    config = load_config(checkpoint)
    path = resolve(checkpoint) / WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    if digest != config.weights_digest:
        raise CheckpointError(
            f"{path} is not the file this checkpoint was saved with: its digest is {digest}, "
            f"config.json names {config.weights_digest}. Copy the checkpoint again."
        )
    model = base_classifier(
        config.architecture,
        classes=len(config.classes),
        input_shape=config.input_shape,
        mean=config.mean,
        std=config.std,
    )
    try:
        model.load_state_dict(load(data))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not fit architecture {config.architecture}: {error}") from error
    return config, model.eval()


def save_checkpoint(model: nn.Module, config: CheckpointConfig, folder: str | Path) -> CheckpointConfig:
    """Write the folder whole or not at all; the configuration as written (its weights digest filled in).

    An existing checkpoint of that name is replaced, and put back should that fail; a folder that holds anything
    else is refused.
    """
    from safetensors.torch import save

    folder = Path(folder)
    if folder.exists() and any(p.name not in (CONFIG, WEIGHTS) for p in folder.iterdir()):
        raise CheckpointError(f"{folder} holds other files than a checkpoint's; choose another --out")
    data = save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    config = replace(config, weights_digest="sha256:" + hashlib.sha256(data).hexdigest())
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (staging / WEIGHTS).write_bytes(data)
        (staging / CONFIG).write_text(
            json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        staging.chmod(0o755)
        for file in staging.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if folder.exists():
            retired = staging.with_name(staging.name + ".old")
            folder.rename(retired)
            try:
                staging.rename(folder)
            except BaseException:
                retired.rename(folder)
                raise
            shutil.rmtree(retired)
        else:
            staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return config
