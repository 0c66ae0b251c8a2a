"""torchvision's classification networks by name, such as `torchvision:resnet18`."""

from __future__ import annotations

import difflib

from torch import nn

from macer_serve.dry_run import output_shape
from macer_serve.errors import ParameterError

PREFIX = "torchvision:"
# Their published weights are of a network with auxiliary outputs and a second normalisation of its own.
AUXILIARY = ("googlenet", "inception_v3")


def torchvision_network(name: str, classes: int, channels: int, height: int, width: int) -> nn.Module:
    """Returns torchvision's network `name` with random weights: normalised pixels `[k, 3, H, W]` to `[k, classes]`.

    Raises `ParameterError` for a name that is no classification network of `torchvision.models`, for images of another
    number of channels than 3, and for a size that the network cannot take.
    """
    _require_classifier(name)
    if channels != 3:
        raise ParameterError(f"{PREFIX}{name} takes images of 3 channels, not {channels}")
    from torchvision.models import get_model

    network: nn.Module = get_model(name, weights=None, num_classes=classes)
    try:
        output_shape(network.eval(), (1, channels, height, width))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ParameterError(
            f"{PREFIX}{name} cannot take images of {height}x{width} ({reason}); "
            "choose another size of images (--size), or another network"
        ) from error
    return network.train()


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
