"""torchvision's classification networks by name, such as `torchvision:resnet18`."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from macer_serve.dry_run import output_shape
from macer_serve.errors import ParameterError, first_line

PREFIX = "torchvision:"
# Their published weights are of a network with auxiliary outputs and a second normalisation of its own.
AUXILIARY = ("googlenet", "inception_v3")
# torchvision's own names of DenseNet's layers differ from those in its published files ("norm.1", now "norm1").
_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def torchvision_network(
    name: str, classes: int, channels: int, height: int, width: int, *, empty: bool = False
) -> nn.Module:
    """Returns torchvision's network `name` with random weights: normalised pixels `[k, 3, H, W]` to `[k, classes]`.

    An `empty` one is on torch's meta device. Raises `ParameterError` for a name that is no classification network of
    `torchvision.models`, for images of another number of channels than 3, and for a size that the network cannot take.
    """
    _require_classifier(name)
    if channels != 3:
        raise ParameterError(f"{PREFIX}{name} takes images of 3 channels, not {channels}")
    from torchvision.models import get_model

    network: nn.Module = empty_network(name, classes) if empty else get_model(name, weights=None, num_classes=classes)
    try:
        output_shape(network.eval(), (1, channels, height, width))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ParameterError(
            f"{PREFIX}{name} cannot take images of {height}x{width} ({first_line(error)}); "
            "choose another size of images, or another network",
            settings=("size", "arch"),
        ) from error
    return network.train()


def empty_network(name: str, classes: int) -> nn.Module:
    """Returns torchvision's network `name` on torch's meta device: it has names and shapes, and no memory for weights.

    RegNets compute their sizes with tensors: all but their head is made on the CPU first.
    """
    from torchvision.models import get_model

    with warnings.catch_warnings(action="ignore"):  # about the initialisation, which weights replace
        try:
            with torch.device("meta"):
                return get_model(name, weights=None, num_classes=classes)  # type: ignore[no-any-return]
        except NotImplementedError:
            network: Any = get_model(name, weights=None, num_classes=1).to("meta")
            network.fc = nn.Linear(network.fc.in_features, classes, device="meta")
            return network  # type: ignore[no-any-return]


def with_current_names(state: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Returns the tensors under the names that torchvision's networks have now."""
    renamed = OrderedDict((_DENSENET.sub(r"\1\2.", name), value) for name, value in state.items())
    if (versions := getattr(state, "_metadata", None)) is not None:
        renamed._metadata = versions  # type: ignore[attr-defined]
    return renamed


def _require_classifier(name: str) -> None:
    """Raises `ParameterError` unless `name` is a network from one image to the logits of its classes."""
    import torchvision
    from torchvision.models import list_models

    names = list_models(module=torchvision.models)
    if name in AUXILIARY:
        raise ParameterError(
            f"{PREFIX}{name} is not supported: in training it returns auxiliary outputs beside its logits. "
            "Choose another network, such as torchvision:resnet18"
        )
    if name in names:
        return
    if name in list_models():
        raise ParameterError(
            f"{PREFIX}{name} is no classification network for single images: networks for detection, segmentation or "
            "video and quantised networks are not supported"
        )
    nearest = difflib.get_close_matches(name, names, n=3) or ["resnet18", "efficientnet_b0", "convnext_tiny"]
    raise ParameterError(f"torchvision has no classification network {name!r}; its names include {', '.join(nearest)}")
