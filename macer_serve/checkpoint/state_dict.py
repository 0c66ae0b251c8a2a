"""Foreign weights: the tensors of a state-dict file, read as data. Nothing that is in the file is executed."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macer_serve.checkpoint.config import digest_of
from macer_serve.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pth", ".pt", ".safetensors")
# Entries under which training scripts keep the weights, beside the epoch and the optimiser's state.
_NESTED = ("state_dict", "model")
_DATA_PARALLEL = "module."
_CODE = re.compile(r"GLOBAL (\S+) (?:whose module|was not an allowed)")


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Returns the tensors of a `.safetensors`, `.pth` or `.pt` file by name, and the file's digest, `sha256:...`.

    A prefix `module.` of all names (torch's data parallelism) is removed. Raises `CheckpointError` for a file that is
    missing, damaged or compressed, that would execute code, or that holds anything but tensors by name.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is no file of weights; its name must end in {', '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    content = _safetensors(path, data) if path.suffix == ".safetensors" else _unpickled(path, data)
    return _without_prefix(_tensors(path, content)), digest_of(data)


def _safetensors(path: Path, data: bytes) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error


def _unpickled(path: Path, data: bytes) -> Any:
    """Returns what torch's restricted unpickler makes of the file: tensors, numbers, strings and containers of them."""
    import torch

    _require_uncompressed(path, data)
    try:
        with warnings.catch_warnings(action="ignore"):  # advice to programmers
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged archive provokes
        text = str(error)
        if code := _CODE.search(text):
            why = f"loading it would call {code[1]}, and only files that hold nothing but tensors are loaded"
        elif "TorchScript" in text:
            why = "it is a TorchScript program, and only files that hold nothing but tensors are loaded"
        else:
            raise CheckpointError(
                f"{path} is damaged, or not written by torch.save; copy it again, or save the weights anew by "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        raise CheckpointError(
            f"{path} is refused: {why}. If you trust its source, save the weights alone, by "
            "torch.save(model.state_dict(), FILE)"
        ) from error


def _require_uncompressed(path: Path, data: bytes) -> None:
    """Raises `CheckpointError` for compressed archives: torch writes none, and a small one may fill the memory."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        if data.startswith(b"PK"):  # torch reads archives that Python's zipfile does not: their size is unknown
            raise CheckpointError(f"{path} is damaged: its archive cannot be read") from error
        return  # an older format of torch's
    if compressed:
        raise CheckpointError(
            f"{path} is refused: {compressed[0]} in it is compressed, and torch.save compresses nothing"
        )


def _tensors(path: Path, content: Any) -> OrderedDict[str, Tensor]:
    """Returns the state dict in `content`, its versions (`_metadata`) included."""
    import torch

    nested = next((key for key in _NESTED if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    found = content if nested is None else content[nested]
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} holds no state dict, but {type(found).__name__}")
    if wrong := [
        name for name, value in found.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]:
        raise CheckpointError(
            f"{path} holds no state dict: {', '.join(map(repr, wrong[:3]))} is no tensor. Save the weights alone, by "
            "torch.save(model.state_dict(), FILE)"
        )
    if wrong := [name for name, value in found.items() if value.is_meta or value.is_sparse or value.is_quantized]:
        raise CheckpointError(f"{path}: {wrong[0]} is no plain tensor of numbers")
    tensors = OrderedDict(found)
    if (versions := getattr(found, "_metadata", None)) is not None:
        tensors._metadata = versions  # type: ignore[attr-defined]  # load_state_dict reads older layouts by it
    return tensors


def _without_prefix(tensors: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
    from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

    if all(name.startswith(_DATA_PARALLEL) for name in tensors):
        consume_prefix_in_state_dict_if_present(tensors, _DATA_PARALLEL)
    return tensors
