"""MACER (Zhai et al. 2020, Algorithm 1): cross-entropy plus a hinge on the soft certified radius."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from macer_serve.training.methods import Logits, Step, Sums
    from macer_serve.training.recipes import Recipe

# Probabilities below this lie beyond any hinge in use (Phi^-1 of it is -11.5), and above it float32 is exact.
_TINY = 1e-30


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
    """MACER's loss over logits `[B, k, classes]` and labels `[B]`, in the logits' own precision.

    With q = mean over k of softmax(beta z), top two t0 >= t1 and xi = Phi^-1(t0) - Phi^-1(t1), a sample
    whose argmax of q is its label and whose xi <= gamma costs (sigma / 2)(gamma - xi). The rest of the
    samples contribute the classification loss -log(mean softmax(z)[y] + 1e-10) alone (eqs. 8-10). Of that loss,
    `label_smoothing` is averaged over all classes in place of the label.

    Phi^-1(t0) is taken as -Phi^-1(1 - t0) with 1 - t0 summed from the other classes, in log space: a
    saturated sample has t0 = 1 in floating point, but never a lost 1 - t0.
    """
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
    # Mask first, then recompute: samples outside the hinge enter as the constant 1/2, so that no gradient
    # ever meets their vanishing probabilities.
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


def macer(model: Logits, images: Tensor, labels: Tensor, recipe: Recipe, step: Step) -> tuple[Tensor, Sums]:
    """MACER's loss on `recipe.k` noisy copies an image; see `training.methods` for shapes."""
    copies = images.repeat_interleave(recipe.copies(step.epoch), 0)
    noise = torch.randn(copies.shape, generator=step.generator, device=images.device)
    logits = model(copies.add_(noise, alpha=recipe.sigma)).float()
    loss, sums = macer_loss(
        logits.view(len(images), recipe.copies(step.epoch), -1),
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
