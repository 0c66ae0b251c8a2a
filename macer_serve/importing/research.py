"""The published files of randomized smoothing: `.pth.tar` of Cohen, Salman and MACER.

Their networks are CIFAR ResNets of basic blocks (20 or 110 layers), torchvision's ResNet-50, and MACER's LeNet. All
are architectures of ours under other names. The state dict lies under `state_dict` (Cohen, Salman) or `net` (MACER);
`module.` in a name comes from DataParallel, and `1.` says that the network follows a normalisation layer. That layer
subtracts the mean and divides by the standard deviation with Cohen, and only subtracts the mean with Salman. Neither
is in the file unless the layer has buffers. MACER has no such layer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from macer_serve.architectures import ARCHITECTURES
from macer_serve.checkpoint.fitting import loaded
from macer_serve.checkpoint.limits import MAX_CLASSES
from macer_serve.checkpoint.state_dict import SUFFIXES, named, read_state_dict
from macer_serve.errors import CheckpointError
from macer_serve.importing.facts import Facts
from macer_serve.importing.foreign import Foreign

State = Mapping[str, Tensor]

ARCHS = {
    "cifar_resnet20": "resnet20",
    "resnet20": "resnet20",
    "cifar_resnet110": "resnet110",
    "resnet110": "resnet110",
    "resnet50": "resnet50",
    "lenet": "lenet",
}
PER_STAGE = {"resnet20": 3, "resnet110": 18}  # blocks
LACKS_NUMBERS = {"layer": "a normalisation layer without numbers"}
_STAGES = re.compile(r"layer([123])\.(\d{1,3})\.(.+)")


def matches(path: Path, arch: str | None) -> bool:
    return path.suffix in SUFFIXES and (arch is None or arch in ARCHS)


def read(path: Path, arch: str | None) -> Foreign:
    """Returns the network. Raises `CheckpointError` for keys that cannot be mapped, and names them."""
    file = read_state_dict(path)
    state, layer = _unwrapped(path, file.tensors)
    told = arch or file.arch
    found = _architecture(state)
    if found is None or ARCHS.get(str(told), found) != found:
        raise CheckpointError(
            f"{path}: its layers are not those of {named([told]) if told else 'a network that is known here'} "
            f"({', '.join(sorted(set(ARCHS)))}): {named(list(state))}. Export the network as ONNX, or name "
            "torchvision's architecture."
        )
    shape = {"lenet": (1, 28, 28), "resnet50": (3, 224, 224)}.get(found, (3, 32, 32))
    ours = {_key(name, found): value for name, value in state.items()}
    if "fc.weight" not in ours or ours["fc.weight"].ndim != 2:
        raise CheckpointError(f"{path}: it has no last layer fc.weight, but {named(list(state))}")
    classes = len(ours["fc.weight"])
    if classes > MAX_CLASSES:
        raise CheckpointError(f"{path}: its last layer is of {classes:,} classes; at most {MAX_CLASSES:,} are allowed")

    def build() -> nn.Module:
        return ARCHITECTURES[found](classes, *shape)

    with torch.device("meta"):
        empty = build()
    what = f"{path} is not a {found} of published research"
    network = loaded(empty, build, ours, what, functools.partial(_published, architecture=found))
    facts = Facts(
        input_shape=shape,
        mean=layer.get("mean"),
        std=layer.get("std"),
        value_range=None if layer == LACKS_NUMBERS or (found == "resnet50" and not layer) else (0.0, 1.0),
        resize=256 if found == "resnet50" else None,
    )
    return Foreign("research", facts, network, architecture=found)


def _unwrapped(path: Path, state: State) -> tuple[State, dict[str, Any]]:
    """Returns the network's own state dict, and what is known of the normalisation layer before it."""
    names = {name: "".join(part for part in re.split(r"(?:^|(?<=\.))module\.", name)) for name in state}
    state = {names[name]: value for name, value in state.items()}
    indices = {name.partition(".")[0] for name in state}
    if "1" not in indices or not indices <= {"0", "1"}:
        return state, {}
    first = {name.partition(".")[2]: value for name, value in state.items() if name.startswith("0.")}
    layer: dict[str, Any] = {}
    for ours, theirs in (("mean", ("mean", "means", "_mean")), ("std", ("std", "sds", "stds", "_std"))):
        if values := [first.pop(name).flatten() for name in theirs if name in first]:
            if len(values[0]) not in (1, 3):
                raise CheckpointError(f"{path}: its normalisation layer has {len(values[0])} values; 1 or 3 are needed")
            layer[ours] = tuple(map(float, values[0]))
    if first:
        raise CheckpointError(
            f"{path}: its first layer is no normalisation, but has {named(['0.' + name for name in first])}"
        )
    network = {name.partition(".")[2]: value for name, value in state.items() if name.startswith("1.")}
    return network, layer or LACKS_NUMBERS


def _architecture(state: State) -> str | None:
    """Returns which of our architectures the layers' names are; None if they are none."""
    if {"conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"} <= set(state):
        return "lenet"
    if "layer4.2.conv3.weight" in state:
        return "resnet50"
    blocks: dict[str, set[int]] = {"1": set(), "2": set(), "3": set()}
    for name in state:
        if found := _STAGES.fullmatch(name):
            blocks[found[1]].add(int(found[2]))
    sizes = {len(numbers) for numbers in blocks.values()}
    return next((name for name, blocks_there in PER_STAGE.items() if sizes == {blocks_there}), None)


def _key(name: str, architecture: str) -> str:
    """Returns our name of a published layer."""
    if architecture == "lenet":
        return name.replace("fc2.", "fc.", 1)
    found = _STAGES.fullmatch(name)
    if found is None or architecture == "resnet50":
        return name
    block = (int(found[1]) - 1) * PER_STAGE[architecture] + int(found[2])
    return f"blocks.{block}.{found[3].replace('downsample.', 'shortcut.', 1)}"


def _published(key: str, architecture: str) -> str:
    """Returns the published name of our layer."""
    if architecture == "lenet":
        return re.sub(r"^fc\.", "fc2.", key)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if found is None:
        return key
    stage, block = divmod(int(found[1]), PER_STAGE[architecture])
    return f"layer{stage + 1}.{block}.{found[2].replace('shortcut.', 'downsample.', 1)}"
