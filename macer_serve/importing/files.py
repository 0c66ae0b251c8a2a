"""Tensors out of foreign files: bounded in size, finite, and without executing anything."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from macer_serve.errors import CheckpointError

MAX_BYTES = 2**31 - 1  # of a model; an ONNX file cannot hold more
_EXPANSION = 4  # torch.save does not compress: a file that expands more was made to

State = dict[str, Tensor]


def read_bytes(path: Path) -> bytes:
    """Returns a file's bytes. Raises `CheckpointError` if it is missing or larger than `MAX_BYTES`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; {MAX_BYTES:,} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def load_tensors(path: Path) -> Any:
    """Returns what a `.safetensors` file or a pickle of `torch.save` holds, on the CPU.

    Pickles are read by `torch.load(weights_only=True)`, which executes nothing. Raises `CheckpointError` for a file
    that holds anything else than tensors and plain values, or that expands beyond its size.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(read_bytes(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    _require_no_bomb(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and hostile pickles raise errors of many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        detail = next((line.strip() for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])
        raise CheckpointError(
            f"{path} cannot be read as data, and nothing in it was executed: {detail} Save the network's state_dict() "
            "alone, as a .pth or .safetensors file."
        ) from error


def _require_no_bomb(path: Path) -> None:
    """Raise `CheckpointError` for a file that is missing, too large, or a zip archive that expands too far."""
    try:
        size = path.stat().st_size
        expanded = 0
        with path.open("rb") as file:
            archived = file.read(2) == b"PK"
        if archived or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                expanded = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if max(size, expanded) > MAX_BYTES or expanded > _EXPANSION * size + 2**20:
        raise CheckpointError(
            f"{path} has {size:,} bytes and expands to {expanded:,}: too much for a network of at most {MAX_BYTES:,}"
        )


def state_of(path: Path, content: Any) -> State:
    """Returns `content` as a state dict: tensors by name, each finite and no larger than what is stored of it.

    Raises `CheckpointError` for anything else.
    """
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state dict, but {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path} holds other things than tensors: {named(others)}")
    for name, tensor in content.items():
        if tensor.is_sparse or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} is sparse, or larger than what the file stores of it")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} has values that are not finite; the network is damaged")
    return {str(name): tensor for name, tensor in content.items()}


def named(keys: list[str]) -> str:
    """Returns the first of the keys in words, and how many more there are."""
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def load_into(
    module: torch.nn.Module, state: State, what: str, named_there: Callable[[str], str] = str
) -> torch.nn.Module:
    """Returns the module with the weights, in eval mode. Raises `CheckpointError` naming the keys that do not fit.

    `named_there` maps the module's keys to those of the file.
    """
    own = module.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}  # absent from files before PyTorch 0.4.1
    problems = {
        "missing are": [name for name in own if name not in state and name not in counters],
        "unknown are": [name for name in state if name not in own],
        "of another shape are": [n for n in own if n in state and own[n].shape != state[n].shape],
    }
    if wrong := [f"{words} {named([named_there(key) for key in keys])}" for words, keys in problems.items() if keys]:
        raise CheckpointError(f"the file is not a {what}: {'; '.join(wrong)}")
    module.load_state_dict(state, strict=False)
    return module.eval()
