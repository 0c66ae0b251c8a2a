"""What a training method is: its class of recipes, its recipes by name, and its loss.

A loss is one small pure function: (model, images, labels, recipe, step) -> (loss, sums). `images` are `[B, C, H, W]` in
[0, 1], `labels` are `[B]`. `sums` are totals over the batch, as tensors on the device. The loop adds them up over an
epoch and divides once, so no method ever waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from macer_serve.training.recipe import SHARED, Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Logits = Callable[["Tensor"], "Tensor"]
Sums = dict[str, "Tensor"]


@dataclass(frozen=True, slots=True)
class Step:
    """Where the run stands: the epoch, counted from 0, and the generator of this step's noise.

    `frozen` opens a context that yields the network in evaluation mode, with constant weights, for attacks to
    differentiate.
    """

    epoch: int
    generator: torch.Generator
    frozen: Callable[[], AbstractContextManager[Logits]]


class NamedRecipe(Protocol):
    """Makes a method's recipe for a data set: `cifar10`, `mnist` or `imagenet`."""

    def __call__(self, dataset: str, sigma: float) -> Recipe: ...


@dataclass(frozen=True, slots=True)
class Method:
    """A training method: its class of recipes, its loss, and its recipes by name.

    `recipes` has the names `published` and `fast`, and `short` if the literature has a second recipe for CIFAR-10.
    `source` says in words whose constants those of `published` are, or None for a data set without any.
    """

    recipe: type[Recipe]
    loss: Callable[[Logits, Tensor, Tensor, Any, Step], tuple[Tensor, Sums]]
    recipes: Mapping[str, NamedRecipe]
    source: Callable[[str, float], str | None]

    def constants(self) -> dict[str, Any]:
        """Returns the dataclass fields of the constants that only this method has."""
        return {own.name: own for own in fields(self.recipe) if own.name not in (*SHARED, "sigma")}
