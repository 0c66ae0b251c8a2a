"""MACER (Zhai et al. 2020, Algorithm 1): cross-entropy plus a hinge on the soft certified radius."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from macer_serve.training.method import Logits, Method, Step, Sums
from macer_serve.training.recipe import Recipe, constant, nearest_sigma

if TYPE_CHECKING:
    from torch import Tensor

# Phi^-1 of this probability is -11.5, beyond any hinge in use. float32 is exact above it.
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class MacerRecipe(Recipe):
    """MACER's constants, by the paper's names (`lam` is its lambda).

    During the first `defer` epochs the robustness loss is off, and `k_deferred` copies are taken in place of `k` (0
    means `k`). With `k_deferred=1` these epochs are Gaussian augmentation.
    """

    method: ClassVar[str] = "macer"

    k: int = constant(16, "noisy copies per image")
    lam: float = constant(12.0, "weight of the robustness loss")
    gamma: float = constant(8.0, "hinge")
    beta: float = constant(16.0, "inverse temperature")
    defer: int = constant(0, "epochs before the robustness loss begins")
    k_deferred: int = constant(0, "noisy copies per image in those epochs, 0 for k")

    def problems(self) -> Mapping[str, bool]:
        return {
            "k must be at least 1": self.k < 1,
            "lam must be finite and not negative": not 0 <= self.lam < math.inf,
            "gamma must be positive and finite": not 0 < self.gamma < math.inf,
            "beta must be positive and finite": not 0 < self.beta < math.inf,
            "defer must not be negative": self.defer < 0,
            "k_deferred must not be negative": self.k_deferred < 0,
        }

    def follow(self, scale: float, given: Mapping[str, Any]) -> dict[str, Any]:
        """Moves the deferral in proportion to the epochs, or to the first milestone if milestones are given.

        The published deferrals end at the first milestone.
        """
        if self.defer and given.get("milestones"):
            return {"defer": min(given["milestones"])}
        return {"defer": round(self.defer * scale)}

    def untrained_loss(self, classes: int) -> float:
        """Returns the loss of a network that gives every class the same logit: ln(classes) and the whole hinge."""
        return math.log(classes) + self.lam * self.sigma / 2 * self.gamma

    def copies(self, epoch: int) -> int:
        """Returns the noisy copies per image in an epoch, counted from 0."""
        return self.k_deferred if self.k_deferred and epoch < self.defer else self.k


def macer_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    sigma: float,
    lam: float,
    gamma: float,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Sums]:
    """Returns MACER's loss and its sums for logits z `[B, k, classes]` and labels y `[B]`, in the logits' precision.

    Every sample costs the classification loss -log(mean softmax(z)[y] + 1e-10). A share `label_smoothing` of this loss
    is averaged over all classes instead of taken at the label. Let q be the mean over k of softmax(beta z), t0 >= t1
    its top two values, and xi = Phi^-1(t0) - Phi^-1(t1). A sample whose argmax of q is its label, and whose xi <=
    gamma, costs lam (sigma / 2)(gamma - xi) more (eqs. 8-10).

    Phi^-1(t0) is computed as -Phi^-1(1 - t0), where 1 - t0 is the sum of the other classes in log space. A saturated
    sample has t0 = 1 in floating point, but its 1 - t0 is not lost.
    """
    import torch

    batch, copies, _ = logits.shape
    log_mean = logits.log_softmax(-1).logsumexp(1) - math.log(copies)
    surprise = -torch.logaddexp(log_mean, log_mean.new_full((), math.log(1e-10)))
    classification = (1.0 - label_smoothing) * surprise.gather(1, labels[:, None]).sum()
    if label_smoothing:
        classification = classification + label_smoothing * surprise.mean(1).sum()

    log_q = (beta * logits).log_softmax(-1).logsumexp(1) - math.log(copies)
    first = log_q.argmax(1)
    others = log_q.scatter(1, first[:, None], -math.inf)
    log_rest, log_second = others.logsumexp(1), others.max(1).values
    right = first == labels

    def xi(log_rest: Tensor, log_second: Tensor) -> Tensor:
        rest, second = (log_p.exp().clamp_min(_TINY) for log_p in (log_rest, log_second))
        value: Tensor = -torch.special.ndtri(rest) - torch.special.ndtri(second)
        return value

    with torch.no_grad():
        state = xi(log_rest, log_second)
        inside = right & (state <= gamma)
    # Mask first, then recompute. Samples outside the hinge enter as the constant 1/2, so that no gradient passes
    # through their vanishing probabilities.
    half = log_rest.new_full((), math.log(0.5))
    hinge = gamma - xi(torch.where(inside, log_rest, half), torch.where(inside, log_second, half))
    robustness = torch.where(inside, hinge, hinge.new_zeros(())).sum() * (sigma / 2)

    with torch.no_grad():
        radius = (sigma / 2) * torch.where(right, state.clamp(0.0, gamma), state.new_zeros(()))
        sums = {
            "classification": classification,
            "robustness": robustness,
            "correct": right.sum(),
            "inside": inside.sum(),
            "saturated": (right & ~inside).sum(),
            "noisy_correct": (logits.argmax(-1) == labels[:, None]).sum().double() / copies,
            "soft_radius": radius.sum(),
        }
    return (classification + lam * robustness) / batch, sums


def macer(model: Logits, images: Tensor, labels: Tensor, recipe: MacerRecipe, step: Step) -> tuple[Tensor, Sums]:
    """Returns MACER's loss on `recipe.k` noisy copies per image, and its sums. See `training.method` for shapes."""
    import torch

    count = recipe.copies(step.epoch)
    copies = images.repeat_interleave(count, 0)
    noise = torch.randn(copies.shape, generator=step.generator, device=images.device)
    logits = model(copies.add_(noise, alpha=recipe.sigma)).float()
    loss, sums = macer_loss(
        logits.view(len(images), count, -1),
        labels,
        sigma=recipe.sigma,
        lam=recipe.lam if step.epoch >= recipe.defer else 0.0,
        gamma=recipe.gamma,
        beta=recipe.beta,
        label_smoothing=recipe.label_smoothing,
    )
    with torch.no_grad():
        sums["loss"] = loss * len(labels)
    return loss, sums


def _published(dataset: str, sigma: float) -> Recipe:
    near = nearest_sigma(sigma)
    if dataset == "imagenet":
        lam, defer = {0.25: (6.0, 0), 0.5: (3.0, 0), 1.0: (3.0, 30)}[near]
        return MacerRecipe(sigma, 120, 256, 0.1, 1e-4, milestones=(30, 60, 90), k=2, lam=lam, defer=defer)
    if dataset == "mnist":
        lam = {0.25: 16.0, 0.5: 16.0, 1.0: 6.0}[near]
        return MacerRecipe(sigma, 90, 256, 0.01, 1e-4, milestones=(30, 60), k=16, lam=lam, defer=30)
    lam, defer = {0.25: (12.0, 0), 0.5: (4.0, 0), 1.0: (12.0, 200)}[near]
    return MacerRecipe(sigma, 440, 64, 0.01, 5e-4, milestones=(200, 400), k=16, lam=lam, defer=defer)


def _short(dataset: str, sigma: float) -> Recipe:
    """The 150 epochs of the other methods (Jeong, Kim & Shin 2023, their baseline)."""
    return _published(dataset, sigma).with_options(
        lr=0.1, weight_decay=1e-4, batch=256, epochs=150, milestones=(50, 100)
    )


def _fast(dataset: str, sigma: float) -> Recipe:
    """Returns this project's own fast recipe; see `docs/training.md`.

    Gaussian augmentation comes first, since the robustness loss costs k times as much and counts only images that are
    classified correctly.
    """
    published = _published(dataset, sigma)
    if dataset == "mnist":  # the published rates, in a third of the epochs: at higher rates the loss undoes a LeNet
        return published.with_options(epochs=30, k=4, k_deferred=1)
    epochs, rate, k, defer = {"cifar10": (150, 0.1, 16, 50), "imagenet": (30, 0.2, 2, 15)}[dataset]
    two_parts = {"k": k, "defer": defer, "k_deferred": 1}
    cycle = {"schedule": "one-cycle", "milestones": (), "nesterov": True, "ema": 0.998}
    return published.with_options(**cycle, **two_parts, epochs=epochs, batch=256, lr=rate, weight_decay=1e-4)


def _source(dataset: str, sigma: float) -> str | None:
    near = nearest_sigma(sigma)
    if dataset == "mnist":
        return "public code of Jeong & Shin 2020"
    if dataset in ("cifar10", "svhn"):
        whose = "lam from public logs, the rest from Zhai et al. 2020" if near == 0.5 else "Zhai et al. 2020"
        return f"{whose}; their code also flips the digits" if dataset == "svhn" else whose
    lam = "" if near == 0.25 else "; lam is ours"
    return f"a public fork of the code of Zhai et al. 2020{lam}" if dataset == "imagenet" else None


METHOD = Method(MacerRecipe, macer, {"published": _published, "short": _short, "fast": _fast}, _source)
