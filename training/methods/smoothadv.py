"""SmoothAdv (Salman et al. 2019): adversarial training of the smoothed classifier, cross-entropy on noisy copies of an
attack on the mean softmax over those very copies (eq. 6, Pseudocode 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from macer_serve.training.methods import Logits, Step, Sums
    from macer_serve.training.recipes import Recipe

_TINY = 1e-20  # under the logarithm, as published
DDN_START, DDN_GAMMA = 256 / 255, 0.05  # the first norm and its growth, as published


def smoothed_loss(model: Logits, x: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """-log of the label's mean softmax over the copies, `[B]`, and whether another class wins, `[B]`.

    `x` `[B, C, H, W]`, `noise` `[B, k, C, H, W]`.
    """
    batch, copies = noise.shape[:2]
    logits = model((x[:, None] + noise).flatten(0, 1)).float().view(batch, copies, -1)
    mean = logits.softmax(-1).mean(1)
    loss = -mean.gather(1, labels[:, None]).squeeze(1).clamp_min(_TINY).log()
    return loss, mean.argmax(1) != labels


def pgd(loss: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, *, epsilon: float, steps: int) -> Tensor:
    """Images within L2 distance `epsilon` of x, in [0, 1], of a higher loss: projected gradient ascent from x."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta = delta + (2 * epsilon / steps) * _direction(loss, x + delta)[0]
        delta = _within(_clipped(x, delta), epsilon)
    return x + delta


def ddn(loss: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, *, epsilon: float, steps: int) -> Tensor:
    """Likewise, by decoupling direction and norm (Rony et al. 2019, Algorithm 1), the norm at most `epsilon`.

    The norm shrinks while the image is misclassified and grows while it is not. The nearest misclassified image
    that was met; where none was, the last one.
    """
    delta = torch.zeros_like(x)
    norm = torch.full((len(x),), min(DDN_START, epsilon), device=x.device)
    best, best_norm = delta, torch.full_like(norm, math.inf)
    for step in range(steps):
        direction, fooled = _direction(loss, x + delta)
        length = delta.flatten(1).norm(dim=1)
        better = fooled & (length < best_norm)
        best, best_norm = torch.where(_wide(better), delta, best), torch.where(better, length, best_norm)
        rate = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        delta = delta + rate * direction
        norm = (norm * torch.where(fooled, 1 - DDN_GAMMA, 1 + DDN_GAMMA)).clamp_max(epsilon)
        delta = _clipped(x, delta * _wide(norm / _length(delta)))
    return x + torch.where(_wide(best_norm.isfinite()), best, delta)


def _direction(loss: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient at x, each image's of L2 norm 1 (or 0), and what the loss says of the classes."""
    x = x.detach().requires_grad_()
    value, fooled = loss(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient / _wide(_length(gradient)), fooled


def _within(delta: Tensor, epsilon: float) -> Tensor:
    """delta, each image's scaled down to norm `epsilon` where it is longer."""
    return delta * _wide((epsilon / _length(delta)).clamp_max(1.0))


def _length(delta: Tensor) -> Tensor:
    """The L2 norm of each image, `[B]`, never quite 0."""
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths.clamp_min(1e-12)


def _clipped(x: Tensor, delta: Tensor) -> Tensor:
    """delta, such that x + delta lies in [0, 1]. As x does, no component grows."""
    return (x + delta).clamp(0.0, 1.0) - x


def _wide(values: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1, 1]`."""
    return values[:, None, None, None]


ATTACKS = {"pgd": pgd, "ddn": ddn}


def smoothadv(model: Logits, images: Tensor, labels: Tensor, recipe: Recipe, step: Step) -> tuple[Tensor, Sums]:
    """Mean cross-entropy of `recipe.k` noisy copies of each attacked image; see `training.methods` for shapes.

    The attack sees the network in evaluation mode and the same noise as the update. Its norm rises linearly to
    `recipe.epsilon` over the first `recipe.ramp` epochs.
    """
    batch, copies = len(images), recipe.k
    noise = recipe.sigma * torch.randn(
        (batch, copies, *images.shape[1:]), generator=step.generator, device=images.device
    )
    epsilon = recipe.epsilon * min(1.0, (step.epoch + 1) / max(1, recipe.ramp))
    attacked = ATTACKS[recipe.attack](
        lambda x: smoothed_loss(step.frozen, x, labels, noise), images, epsilon=epsilon, steps=recipe.attack_steps
    )
    logits = model((attacked.detach()[:, None] + noise).flatten(0, 1)).float()
    repeated = labels.repeat_interleave(copies)
    loss = F.cross_entropy(logits, repeated, label_smoothing=recipe.label_smoothing)
    with torch.no_grad():
        sums = {
            "loss": loss * batch,
            "noisy_correct": (logits.argmax(1) == repeated).sum().double() / copies,
            "attack_norm": (attacked - images).flatten(1).norm(dim=1).sum(),
        }
    return loss, sums
