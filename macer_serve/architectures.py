"""Base classifiers by name: networks from pixel values in [0, 1] to logits.

Every network here starts with its own normalisation layer, so that sigma is always in units of pixel
values and nobody has to remember which mean and standard deviation a checkpoint was trained with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macer_serve.errors import ParameterError
from macer_serve.torchvision_networks import PREFIX, torchvision_network


class Normalise(nn.Module):
    """(x - mean) / std per channel, for x `[k, channels, height, width]` in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not persistent: the values live in config.json, the one home of what a checkpoint means.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016); 1x1 convolution + BN if the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for small images: three stages of `blocks` basic blocks, widths w, 2w, 4w (He et al. 2016, §4.2).

    `stem_stride=2` halves the resolution in a 4x4 stem. Under noise the finest scale carries little, and
    doubled widths at half the resolution cost the same multiply-adds in far fewer, wider operations.
    """

    def __init__(self, classes: int, channels: int, blocks: int, width: int, stem_stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3 if stem_stride == 1 else 4, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        channels_in = width
        for stage in range(3):
            channels_out = width << stage
            for block in range(blocks):
                stages.append(BasicBlock(channels_in, channels_out, 2 if stage > 0 and block == 0 else 1))
                channels_in = channels_out
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(h.mean((2, 3)))  # type: ignore[no-any-return]


class LeNet(nn.Module):
    """Two 5x5 convolutions (20, 50) with pooling, then 500 hidden units: the MNIST network of MACER."""

    def __init__(self, classes: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        side = [((size - 4) // 2 - 4) // 2 for size in (height, width)]
        if min(side) < 1:
            raise ParameterError(f"lenet needs images of at least 16x16, not {height}x{width}")
        self.fc1 = nn.Linear(50 * side[0] * side[1], 500)
        self.fc = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)
        return self.fc(F.relu(self.fc1(h.flatten(1))))  # type: ignore[no-any-return]


def _resnet50(classes: int, channels: int, height: int, width: int) -> nn.Module:
    if channels != 3:
        raise ParameterError(f"resnet50 takes images of 3 channels, not {channels}")
    from torchvision.models import resnet50

    network: nn.Module = resnet50(weights=None, num_classes=classes)
    return network


Builder = Callable[[int, int, int, int], nn.Module]

ARCHITECTURES: dict[str, Builder] = {
    "lenet": LeNet,
    "resnet20": lambda classes, channels, h, w: CifarResNet(classes, channels, blocks=3, width=16),
    "resnet110": lambda classes, channels, h, w: CifarResNet(classes, channels, blocks=18, width=16),
    "resnet20-s2": lambda classes, channels, h, w: CifarResNet(classes, channels, 3, width=32, stem_stride=2),
    "resnet20-s2-w48": lambda classes, channels, h, w: CifarResNet(classes, channels, 3, width=48, stem_stride=2),
    "resnet50": _resnet50,
}


def is_named(architecture: str) -> bool:
    """Returns whether `base_classifier` knows the architecture, so that its weights alone say what the network is."""
    return architecture in ARCHITECTURES or architecture.startswith(PREFIX)


def base_classifier(
    architecture: str,
    *,
    classes: int,
    input_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    empty: bool = False,
) -> nn.Module:
    """Returns the named network behind its normalisation: `[k, *input_shape]` in [0, 1] -> logits `[k, classes]`.

    An `empty` one is on torch's meta device: it has names and shapes, and no memory for weights. The name is one of
    `ARCHITECTURES` or `torchvision:NAME`. Raises `ParameterError` for any other name, and for a network that cannot
    take `input_shape`.
    """
    if architecture.startswith(PREFIX):
        network = torchvision_network(architecture.removeprefix(PREFIX), classes, *input_shape, empty=empty)
        return nn.Sequential(Normalise(mean, std), network)
    try:
        build = ARCHITECTURES[architecture]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ParameterError(
            f"unknown architecture {architecture!r}; choose one of: {known}, or torchvision:NAME"
        ) from None
    with torch.device("meta") if empty else contextlib.nullcontext():
        return nn.Sequential(Normalise(mean, std), build(classes, *input_shape))
