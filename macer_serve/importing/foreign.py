"""Foreign networks as they are read, and the table of formats.

A format is one module with `matches(path, arch)`, which says whether it reads such a file, and `read(path, arch)`. A
new format is that module and one entry of `FORMATS`.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macer_serve.errors import CheckpointError
from macer_serve.importing.facts import Facts

if TYPE_CHECKING:
    from torch import nn

FORMATS = {
    "onnx": "macer_serve.importing.onnx",
    "torchvision": "macer_serve.importing.torchvision",
    "research": "macer_serve.importing.research",
}


@dataclass(frozen=True, slots=True)
class Foreign:
    """A network as its file holds it: a torch module in eval mode, or an `onnx.ModelProto`.

    `facts` are those that the file states. The network reads normalised pixels. `architecture` is its name in
    `macer_serve.architectures`, if it is one of ours.
    """

    format: str
    facts: Facts
    network: nn.Module | Any
    architecture: str | None = None


def read_foreign(path: Path, arch: str | None) -> Foreign:
    """Returns the network of a file by the first format that reads such files. Raises `CheckpointError`."""
    if not os.path.isfile(path):  # unlike Path's, it takes names that are too long
        raise CheckpointError(f"{path} is not a file")
    for name in FORMATS.values():
        module: Any = importlib.import_module(name)
        if module.matches(path, arch):
            return module.read(path, arch)  # type: ignore[no-any-return]
    raise CheckpointError(
        f"{path} cannot be imported{f' as {arch}' if arch else ''}: an .onnx file can, a published .pth or .pth.tar "
        "file of randomized smoothing, and torchvision:NAME with its state dict (.pth or .safetensors)"
    )
