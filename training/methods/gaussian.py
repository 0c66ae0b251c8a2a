"""Gaussian augmentation (Cohen, Rosenfeld & Kolter 2019, §3.3): cross-entropy on one noisy copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from macer_serve.training.method import Logits, Method, Step, Sums
from macer_serve.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class GaussianRecipe(Recipe):
    """The constants of Gaussian augmentation: the optimiser's, and no others."""

    method: ClassVar[str] = "gaussian"


def gaussian(model: Logits, images: Tensor, labels: Tensor, recipe: Recipe, step: Step) -> tuple[Tensor, Sums]:
    """Returns the mean cross-entropy of the noisy images, and its sums. See `training.method` for shapes."""
    import torch
    import torch.nn.functional as F

    noise = torch.randn(images.shape, generator=step.generator, device=images.device)
    logits = model(torch.add(images, noise, alpha=recipe.sigma)).float()
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    with torch.no_grad():
        sums = {"loss": loss * len(labels), "noisy_correct": (logits.argmax(1) == labels).sum()}
    return loss, sums


def _published(dataset: str, sigma: float) -> Recipe:
    if dataset == "imagenet":
        return GaussianRecipe(sigma, 90, 256, 0.1, 1e-4, milestones=(30, 60))
    if dataset == "mnist":
        return GaussianRecipe(sigma, 90, 256, 0.01, 1e-4, milestones=(30, 60))
    return GaussianRecipe(sigma, 150, 256, 0.1, 1e-4, milestones=(50, 100))


def _fast(dataset: str, sigma: float) -> Recipe:
    """Returns this project's own fast recipe; see `docs/training.md`."""
    if dataset == "mnist":
        return _published(dataset, sigma).with_options(epochs=30)
    epochs, rate, decay = {"cifar10": (150, 0.2, 5e-4), "imagenet": (30, 0.5, 5e-5)}[dataset]
    return GaussianRecipe(sigma, epochs, 256, rate, decay, schedule="one-cycle", nesterov=True, ema=0.998)


def _source(dataset: str, sigma: float) -> str | None:
    return {
        "cifar10": "Cohen et al. 2019",
        "imagenet": "Cohen et al. 2019",
        "mnist": "public code of Jeong & Shin 2020",
    }.get(dataset)


METHOD = Method(GaussianRecipe, gaussian, {"published": _published, "short": _published, "fast": _fast}, _source)
