"""Foreign weights: the tensors of a state-dict file, read as data. Nothing that is in the file is executed."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macer_serve.checkpoint.config import digest_of
from macer_serve.checkpoint.limits import read_bytes
from macer_serve.checkpoint.pickles import RefusedPickleError, require_plain
from macer_serve.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    State = OrderedDict[str, Tensor]

SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")
# Entries under which training scripts keep the weights, beside the epoch and the optimiser's state.
_NESTED = ("state_dict", "net", "model")
_DATA_PARALLEL = "module."
_REMEDY = "save the weights alone, by torch.save(model.state_dict(), FILE)"


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors of a file by name, the file's digest `sha256:...`, and the architecture that the file states."""

    tensors: State
    digest: str
    arch: str | None = None


def read_state_dict(path: str | Path) -> StateDict:
    """Returns what a `.safetensors`, `.pth`, `.pt` or `.pth.tar` file holds.

    A prefix `module.` of all names (torch's data parallelism) is removed. Raises `CheckpointError` for a file that is
    missing, damaged or compressed, that would execute code, or that holds anything but finite numbers by name.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} holds no weights that can be read: the name must end in {', '.join(SUFFIXES)}")
    data = read_bytes(path)
    content = _safetensors(path, data) if path.suffix == ".safetensors" else _unpickled(path, data)
    arch = content.get("arch") if isinstance(content, dict) else None
    tensors = _without_prefix(_tensors(path, content))
    return StateDict(tensors, digest_of(data), arch if isinstance(arch, str) else None)


def tensors_of(path: Path, data: bytes) -> State:
    """Returns the tensors in the bytes of a `.safetensors` file. Raises `CheckpointError`."""
    return _tensors(path, _safetensors(path, data))


def named(names: Iterable[Any]) -> str:
    """Returns the first of the names in words, and how many more there are."""
    known = list(names)
    shown = [name[:80] if isinstance(name, str) and name.isprintable() else ascii(name)[:80] for name in known[:5]]
    return ", ".join(shown) + (f" and {len(known) - 5} more" if len(known) > 5 else "")


def _safetensors(path: Path, data: bytes) -> Any:
    from safetensors.torch import load

    try:
        return load(data)
    except Exception as error:  # its own, and KeyError for a type of numbers that torch lacks
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {str(error)[:200]}") from error


def _unpickled(path: Path, data: bytes) -> Any:
    """Returns what torch's restricted unpickler makes of the file: tensors, numbers, strings and containers of them."""
    import torch

    try:
        if data.startswith(b"PK") or zipfile.is_zipfile(io.BytesIO(data)):
            data = _checked_archive(data)
        else:
            require_plain(data, older_format=True)
        with warnings.catch_warnings(action="ignore"):  # advice to programmers
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except RefusedPickleError as error:
        raise CheckpointError(
            f"{path} is refused, and nothing in it was executed: {error}. If you trust its source, {_REMEDY}"
        ) from error
    except Exception as error:  # torch.load raises whatever a damaged archive provokes
        raise CheckpointError(
            f"{path} is damaged, or not written by torch.save: it cannot be read. Copy it again, or {_REMEDY}"
        ) from error


def _checked_archive(data: bytes) -> bytes:
    """Returns the archive written anew, its pickles checked, so that torch finds in it what was checked.

    Two readers of one hostile archive can find different files. torch compresses nothing; a small compressed file may
    fill the memory, as may entries that overlap. Raises `RefusedPickleError`, and errors of many kinds for damage.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(copy, "w") as checked:
        entries = archive.infolist()
        if compressed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            raise RefusedPickleError(f"{named(compressed[:1])} in it is compressed, and torch.save compresses nothing")
        names = {entry.filename.lower() for entry in entries}
        if len(names) < len(entries) or sum(entry.file_size for entry in entries) > len(data):
            raise RefusedPickleError("entries of its archive overlap, or share a name")
        if any(name.endswith("/constants.pkl") for name in names):
            raise RefusedPickleError("it is a TorchScript program")
        for entry in entries:
            content = archive.read(entry)
            if entry.filename.lower().endswith("data.pkl"):
                require_plain(content)
            checked.writestr(entry.filename, content)
    return copy.getvalue()


def _tensors(path: Path, content: Any) -> State:
    """Returns the state dict in `content`, its versions (`_metadata`) included."""
    import torch

    nested = next((key for key in _NESTED if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
    found = content if nested is None else content[nested]
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} holds no state dict, but {type(found).__name__}")
    items = list(dict.items(found))  # a pickle may give an OrderedDict attributes of any name
    if wrong := [n for n, value in items if not (isinstance(n, str) and isinstance(value, torch.Tensor))]:
        raise CheckpointError(f"{path} holds more than named tensors: {named(wrong)}. Please {_REMEDY}")
    tensors = OrderedDict((name, value.detach()) for name, value in items)
    for name, tensor in tensors.items():
        if problem := _problem(name, tensor):
            raise CheckpointError(f"{path}: {named([name])} {problem}")
    versions = getattr(found, "_metadata", None)
    if isinstance(versions, dict):  # load_state_dict reads older layouts by it
        tensors._metadata = {  # type: ignore[attr-defined]
            module: {"version": entry["version"]}
            for module, entry in dict.items(versions)
            if isinstance(module, str) and isinstance(entry, dict) and isinstance(entry.get("version"), int)
        }
    return tensors


def _problem(name: str, tensor: Tensor) -> str | None:
    """Returns why a tensor cannot be a weight; None if it can."""
    import torch

    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return "is no plain tensor of numbers"
    if tensor.dtype not in (*floats, *whole):
        return f"is of {tensor.dtype}: weights are float16, bfloat16, float32 or float64"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "is larger than what the file stores of it"
    if tensor.dtype in floats and not bool(torch.isfinite(tensor.float()).all()):
        return "has values that are not finite in float32; the network is damaged"
    if name.endswith("running_var") and bool((tensor < 0).any()):
        return "has negative values, and is a variance; the network is damaged"
    return None


def _without_prefix(tensors: State) -> State:
    from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

    if all(name.startswith(_DATA_PARALLEL) for name in tensors):
        consume_prefix_in_state_dict_if_present(tensors, _DATA_PARALLEL)
    return tensors
