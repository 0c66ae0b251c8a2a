"""Consistency regularisation (Jeong & Shin 2020, arXiv 2006.04062): noisy copies of one image shall agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from macer_serve.training.method import Logits, Method, Step, Sums
from macer_serve.training.recipe import Recipe, constant, nearest_sigma

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ConsistencyRecipe(Recipe):
    """The constants of consistency regularisation, by the paper's names (`k` is its m, `lam` its lambda)."""

    method: ClassVar[str] = "consistency"

    k: int = constant(2, "noisy copies per image")
    lam: float = constant(20.0, "weight of the copies' divergence from their mean")
    eta: float = constant(0.5, "weight of the mean's entropy")

    def problems(self) -> Mapping[str, bool]:
        return {
            "k must be at least 2, since one copy always agrees with itself": self.k < 2,
            "lam must be finite and not negative": not 0 <= self.lam < math.inf,
            "eta must be finite and not negative": not 0 <= self.eta < math.inf,
        }

    def untrained_loss(self, classes: int) -> float:
        """Returns the loss of a network that gives every class the same logit. Its copies agree."""
        return (1.0 + self.eta) * math.log(classes)


def consistency_loss(
    logits: Tensor, labels: Tensor, *, lam: float, eta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Sums]:
    """Returns the loss and its sums for logits z `[B, k, classes]` and labels y `[B]`, in the logits' precision.

    Let p_j = softmax(z_j), and p their mean over the k copies. An image costs the mean cross-entropy of its copies,
    lam times the mean of KL(p || p_j), and eta times the entropy of p (eqs. 6 and 7).

    All logarithms are taken of softmaxes in log space, so loss and gradient are finite for all finite logits.
    """
    import torch.nn.functional as F

    batch, copies, _ = logits.shape
    repeated = labels.repeat_interleave(copies)
    flat = logits.flatten(0, 1)
    classification = F.cross_entropy(flat, repeated, label_smoothing=label_smoothing, reduction="sum") / copies

    log_p = logits.log_softmax(-1)
    log_mean = log_p.logsumexp(1) - math.log(copies)
    mean = log_mean.exp()
    entropy = -(mean * log_mean).sum()
    # The mean over j of KL(p || p_j) is the mean cross-entropy of p with p_j, less the entropy of p.
    divergence = -(mean * log_p.mean(1)).sum() - entropy

    sums = {
        "classification": classification,
        "divergence": divergence,
        "entropy": entropy,
        "noisy_correct": (flat.detach().argmax(1) == repeated).sum().double() / copies,
    }
    return (classification + lam * divergence + eta * entropy) / batch, sums


def consistency(
    model: Logits, images: Tensor, labels: Tensor, recipe: ConsistencyRecipe, step: Step
) -> tuple[Tensor, Sums]:
    """Returns the loss on `recipe.k` noisy copies per image, and its sums. See `training.method` for shapes."""
    import torch

    copies = images.repeat_interleave(recipe.k, 0)
    noise = torch.randn(copies.shape, generator=step.generator, device=images.device)
    logits = model(copies.add_(noise, alpha=recipe.sigma)).float()
    loss, sums = consistency_loss(
        logits.view(len(images), recipe.k, -1),
        labels,
        lam=recipe.lam,
        eta=recipe.eta,
        label_smoothing=recipe.label_smoothing,
    )
    return loss, {**sums, "loss": loss * len(labels)}


def _published(dataset: str, sigma: float) -> Recipe:
    near = nearest_sigma(sigma)
    if dataset == "imagenet":
        eta = 0.1 if near == 1.0 else 0.5
        return ConsistencyRecipe(sigma, 90, 256, 0.1, 1e-4, milestones=(30, 60), lam=5.0, eta=eta)
    if dataset == "mnist":
        lam = 10.0 if near == 0.25 else 5.0
        return ConsistencyRecipe(sigma, 90, 256, 0.01, 1e-4, milestones=(30, 60), lam=lam)
    lam = 20.0 if near == 0.25 else 10.0
    return ConsistencyRecipe(sigma, 150, 256, 0.1, 1e-4, milestones=(50, 100), lam=lam)


def _fast(dataset: str, sigma: float) -> Recipe:
    """Returns this project's own fast recipe; see `docs/training.md`."""
    published = _published(dataset, sigma)
    if dataset == "mnist":
        return published.with_options(epochs=30)
    epochs = {"cifar10": 150, "imagenet": 30}[dataset]
    return published.with_options(epochs=epochs, schedule="one-cycle", milestones=(), nesterov=True, ema=0.998)


def _source(dataset: str, sigma: float) -> str | None:
    if dataset == "imagenet" and nearest_sigma(sigma) == 0.25:
        return "Jeong & Shin 2020 at sigma 0.5; they publish none at 0.25"
    known = ("cifar10", "mnist", "imagenet")
    return (
        "lam and eta from the public logs of Jeong & Shin 2020, the rest from their code" if dataset in known else None
    )


METHOD = Method(ConsistencyRecipe, consistency, {"published": _published, "short": _published, "fast": _fast}, _source)
