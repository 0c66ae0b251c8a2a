"""torchvision's classifiers by name, with the weights of a state dict file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from macer_serve.checkpoint.limits import MAX_CLASSES
from macer_serve.checkpoint.state_dict import read_state_dict
from macer_serve.errors import CheckpointError, ParameterError
from macer_serve.importing.facts import Facts
from macer_serve.importing.foreign import Foreign
from macer_serve.torchvision_networks import AUXILIARY, PREFIX, empty_network, with_current_names

if TYPE_CHECKING:
    from torch import nn

OURS = {"resnet50"}  # the same network in `macer_serve.architectures`


def matches(path: Path, arch: str | None) -> bool:
    return arch is not None and arch.startswith(PREFIX)


def read(path: Path, arch: str | None) -> Foreign:
    """Returns the network. Raises `CheckpointError` for weights that are not its own, `ParameterError` for its name."""
    import torchvision

    from macer_serve.checkpoint.fitting import head_tensors, loaded

    name = (arch or "").removeprefix(PREFIX)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ParameterError(f"torchvision has no classifier {name!r}; it has {', '.join(known)}")
    state = with_current_names(read_state_dict(path).tensors)
    head = head_tensors(empty_network(name, 1))[0]
    if head not in state or not state[head].ndim:
        raise CheckpointError(f"{path} is not a {arch}: it has no {head}")
    classes = len(state[head])
    if not 1 <= classes <= MAX_CLASSES:
        raise CheckpointError(f"{path}: {head} is of {classes:,} classes; 1 to {MAX_CLASSES:,} are allowed")

    def build() -> nn.Module:
        with warnings.catch_warnings(action="ignore"):  # about the initialisation, which the weights replace
            network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
        return network

    network = loaded(empty_network(name, classes), build, state, f"{path} is not a {arch}")
    ours = name if name in OURS else None if name in AUXILIARY else f"{PREFIX}{name}"
    return Foreign("torchvision", Facts(), network, architecture=ours)
