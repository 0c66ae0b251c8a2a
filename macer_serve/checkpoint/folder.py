"""Reading and writing checkpoint folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from macer_serve.atomic_writes import atomic_folder
from macer_serve.base_classifier import BaseClassifier
from macer_serve.checkpoint.config import GRAPH, INT8, WEIGHTS, CheckpointConfig, digest_of
from macer_serve.checkpoint.limits import MAX_CONFIG_BYTES, parse_json, read_bytes
from macer_serve.errors import CheckpointError, OutputError, ParameterError

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"
FILES = (CONFIG, WEIGHTS, GRAPH, INT8)  # all that a checkpoint's folder may hold
BUNDLED = Path(__file__).resolve().parent.parent / "bundled"


def resolve(checkpoint: str | Path) -> Path:
    """Returns the checkpoint's folder: `bundled:NAME` or a path. Raises `CheckpointError` if it is not there."""
    text = str(checkpoint)
    path = BUNDLED / text.removeprefix("bundled:") if text.startswith("bundled:") else Path(text)
    try:
        path = path.expanduser()
        found = (path / CONFIG).is_file()
    except (OSError, RuntimeError, ValueError):  # a name too long, a user who is unknown, a null byte
        found = False
    if not found:
        bundled = ", ".join(f"bundled:{p.name}" for p in sorted(BUNDLED.glob("*/")) if (p / CONFIG).is_file())
        raise CheckpointError(
            f"{path} is not a checkpoint: no {CONFIG} in it. Name a folder written by 'macer train' or 'macer import', "
            f"or one of: {bundled or 'none is bundled'}"
        )
    return path


def load_config(checkpoint: str | Path) -> CheckpointConfig:
    """Returns the configuration alone, for callers that never run the network. Raises `CheckpointError`."""
    path = resolve(checkpoint) / CONFIG
    try:
        return CheckpointConfig.from_json(parse_json(read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_checkpoint(checkpoint: str | Path) -> tuple[CheckpointConfig, BaseClassifier]:
    """Returns the configuration and the base classifier, in every form that the checkpoint holds.

    Raises `CheckpointError` for a file that is missing, or whose digest is not the one that the configuration names, or
    a graph that needs other files or does not run within the bounds of `macer_serve.onnx_trial`.
    Weights are read when an engine asks for the torch module.
    """
    config = load_config(checkpoint)
    folder = resolve(checkpoint)

    def graph(name: str) -> bytes | None:
        if name not in config.files:
            return None
        from macer_serve.onnx_trial import require_runnable

        data = read_file(folder, config, name)
        require_runnable(data, config.input_shape, folder / name)
        return data

    def module() -> nn.Module:
        return _module(config, folder)

    return config, BaseClassifier(
        input_shape=config.input_shape,
        classes=len(config.classes),
        load_module=module if WEIGHTS in config.files else None,
        onnx=graph(GRAPH),
        int8=graph(INT8),
    )


def load_model(checkpoint: str | Path) -> tuple[CheckpointConfig, nn.Module]:
    """Returns the configuration and the base classifier as a torch module in eval mode.

    Raises `CheckpointError`, and `EngineError` for a checkpoint that holds an ONNX graph only.
    """
    config, classifier = load_checkpoint(checkpoint)
    return config, classifier.module()


def read_file(folder: Path, config: CheckpointConfig, name: str) -> bytes:
    """Returns the bytes of a checkpoint's file. Raises `CheckpointError` unless its digest is the configuration's."""
    path = folder / name
    data = read_bytes(path)
    if (digest := digest_of(data)) != config.files[name]:
        raise CheckpointError(
            f"{path} is not the file this checkpoint was saved with: its digest is {digest}, "
            f"config.json names {config.files[name]}. Copy the checkpoint again."
        )
    return data


def _module(config: CheckpointConfig, folder: Path) -> nn.Module:
    """Returns the named architecture with the checkpoint's weights, in eval mode."""
    from macer_serve.architectures import base_classifier
    from macer_serve.checkpoint.fitting import loaded
    from macer_serve.checkpoint.state_dict import tensors_of

    state = tensors_of(folder / WEIGHTS, read_file(folder, config, WEIGHTS))

    def build(*, empty: bool = False) -> nn.Module:
        return base_classifier(
            config.architecture,
            classes=len(config.classes),
            input_shape=config.input_shape,
            mean=config.mean,
            std=config.std,
            empty=empty,
        )

    what = f"{folder / WEIGHTS} does not fit architecture {config.architecture}"
    try:
        return loaded(build(empty=True), build, state, what)
    except ParameterError as error:  # of the architecture or its input's shape, which the configuration names
        raise CheckpointError(f"{what}: {error}") from error


def require_free(folder: str | Path) -> None:
    """Raise `CheckpointError` if a checkpoint cannot be written there: a file, or a folder that holds other files."""
    folder = Path(folder)
    try:
        if folder.is_dir():
            if any(p.name not in FILES for p in folder.iterdir()):
                raise CheckpointError(f"{folder} holds other files than a checkpoint's; choose another output")
        elif folder.exists():
            raise CheckpointError(f"{folder} is a file, not a folder: choose another output")
    except OSError as error:  # a folder that cannot be read, a circle of symbolic links
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error


def write_checkpoint(config: CheckpointConfig, files: Mapping[str, bytes], folder: str | Path) -> CheckpointConfig:
    """Writes the folder whole or not at all; returns the configuration with the digests of `files`.

    An existing checkpoint of that name is replaced, and put back if that fails. If the folder is a symbolic link, the
    link stays and its target is replaced. Raises `CheckpointError` for a folder that holds anything else, `OutputError`
    for a place that cannot be written.
    """
    folder = Path(folder)
    config = replace(config, files={name: digest_of(data) for name, data in files.items()})
    require_free(folder)
    with atomic_folder(folder) as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)
        (staging / CONFIG).write_text(
            json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return config
