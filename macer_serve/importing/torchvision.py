"""torchvision's classifiers by name, with the weights of a state dict file."""

from __future__ import annotations

import warnings
from pathlib import Path

from macer_serve.errors import CheckpointError, ParameterError
from macer_serve.importing.facts import Facts
from macer_serve.importing.files import load_into, load_tensors, state_of
from macer_serve.importing.foreign import Foreign
from macer_serve.torchvision_networks import AUXILIARY, PREFIX

OURS = {"resnet50"}  # the same network in `macer_serve.architectures`


def matches(path: Path, arch: str | None) -> bool:
    return arch is not None and arch.startswith(PREFIX)


def read(path: Path, arch: str | None) -> Foreign:
    """Returns the network. Raises `CheckpointError` for weights that are not its own, `ParameterError` for its name."""
    import torch
    import torchvision

    name = (arch or "").removeprefix(PREFIX)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ParameterError(f"torchvision has no classifier {name!r}; it has {', '.join(known)}")
    content = load_tensors(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    state = {key.removeprefix("module."): value for key, value in state_of(path, content).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the initialisation, which the weights replace
        try:
            with torch.device("meta"):  # costs no initialisation
                plain = torchvision.models.get_model(name, weights=None)
        except NotImplementedError:  # RegNets compute their sizes with tensors
            plain = torchvision.models.get_model(name, weights=None)
        head = list(plain.state_dict())[-1]
        if head not in state:
            raise CheckpointError(f"{path} is not a {arch}: it has no {head}")
        network = torchvision.models.get_model(name, weights=None, num_classes=len(state[head]))
    load_into(network, state, str(arch))
    ours = name if name in OURS else None if name in AUXILIARY else f"{PREFIX}{name}"
    return Foreign("torchvision", Facts(), network, architecture=ours)
