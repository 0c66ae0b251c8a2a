"""One small pure function a method: (model, images, labels, recipe, step) -> (loss, sums).

`images` are `[B, C, H, W]` in [0, 1], `labels` `[B]`. `sums` are totals over the batch, tensors on the
device, which the loop adds up over an epoch and divides once: no method ever waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from macer_serve.training.methods.gaussian import gaussian
from macer_serve.training.methods.macer import macer
from macer_serve.training.methods.smoothadv import smoothadv
from macer_serve.training.recipes import Recipe

Sums = dict[str, Tensor]
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """What a method may know of where the run stands: the epoch (from 0) and the step's own noise source.

    `frozen` is the network in evaluation mode, its weights constants: what an attack differentiates.
    """

    epoch: int
    generator: torch.Generator
    frozen: Logits


MethodFunction = Callable[[Logits, Tensor, Tensor, Recipe, Step], tuple[Tensor, Sums]]

METHOD_FUNCTIONS: dict[str, MethodFunction] = {"gaussian": gaussian, "macer": macer, "smoothadv": smoothadv}
