"""Gaussian augmentation (Cohen, Rosenfeld & Kolter 2019, §3.3): cross-entropy on one noisy copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from macer_serve.training.methods import Logits, Step, Sums
    from macer_serve.training.recipes import Recipe


def gaussian(model: Logits, images: Tensor, labels: Tensor, recipe: Recipe, step: Step) -> tuple[Tensor, Sums]:
    """Mean cross-entropy of the noisy images and its sums; see `training.methods` for shapes."""
    noise = torch.randn(images.shape, generator=step.generator, device=images.device)
    logits = model(torch.add(images, noise, alpha=recipe.sigma)).float()
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    with torch.no_grad():
        sums = {"loss": loss * len(labels), "noisy_correct": (logits.argmax(1) == labels).sum()}
    return loss, sums
