"""SmoothAdv (Salman et al. 2019): adversarial training of the smoothed classifier.

The loss is the cross-entropy of noisy copies of an attacked image. The attack raises the loss of the mean softmax over
these very copies (eq. 6, Pseudocode 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from macer_serve.training.method import Logits, Method, Step, Sums
from macer_serve.training.recipe import Recipe, constant, nearest_sigma

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Loss = Callable[[Tensor], tuple[Tensor, Tensor]]

_TINY = 1e-20  # least probability under the logarithm, as in the authors' code
_DDN_GAMMA, _DDN_LEVELS = 0.05, 255  # growth of the norm per step, and levels of a pixel above 0, as in their code


@dataclass(frozen=True, slots=True)
class SmoothAdvRecipe(Recipe):
    """SmoothAdv's constants. The bound of the attack rises linearly to `epsilon` over the first `ramp` epochs."""

    method: ClassVar[str] = "smoothadv"

    k: int = constant(8, "noisy copies per image")
    attack: Literal["pgd", "ddn"] = constant("pgd", "the attack", choices=("pgd", "ddn"))
    epsilon: float = constant(1.0, "most L2 norm of the attack, in pixel values in [0, 1]")
    attack_steps: int = constant(10, "steps of the attack")
    ramp: int = constant(10, "epochs in which epsilon rises to its value")

    def problems(self) -> Mapping[str, bool]:
        return {
            "k must be at least 1": self.k < 1,
            "attack must be pgd or ddn": self.attack not in ATTACKS,
            "epsilon must be finite and not negative": not 0 <= self.epsilon < math.inf,
            "attack_steps and ramp must not be negative": min(self.attack_steps, self.ramp) < 0,
        }

    def follow(self, scale: float, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"ramp": round(self.ramp * scale)}


def smoothed_loss(model: Logits, x: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Returns -log of the label's mean softmax over the copies, `[B]`, and whether their vote is another class, `[B]`.

    `x` is `[B, C, H, W]`, `noise` is `[B, k, C, H, W]`. Each copy votes for its largest logit.
    """
    batch, copies = noise.shape[:2]
    logits = model((x[:, None] + noise).flatten(0, 1)).float().view(batch, copies, -1)
    loss = -logits.softmax(-1).mean(1).gather(1, labels[:, None]).squeeze(1).clamp_min(_TINY).log()
    return loss, logits.argmax(-1).mode(1).values != labels


def pgd(loss: Loss, x: Tensor, *, epsilon: float, steps: int, generator: torch.Generator) -> Tensor:
    """Returns images of a higher loss in [0, 1], within L2 distance `epsilon` of x: projected gradient ascent from x.

    Draws nothing from the generator.
    """
    delta = x.new_zeros(x.shape)
    for _ in range(steps):
        gradient, _ = _gradient(loss, x + delta)
        delta = delta + (2 * epsilon / steps) * gradient / _wide(_length(gradient))
        delta = _within(_clipped(x, delta), epsilon)
    return x + delta


def ddn(loss: Loss, x: Tensor, *, epsilon: float, steps: int, generator: torch.Generator) -> Tensor:
    """Returns the nearest images found that are misclassified, by decoupling direction and norm (Rony et al. 2019).

    This is Algorithm 1 as in the code of Salman et al.: the norm starts at `epsilon`, shrinks after a step that fools
    the vote and grows after one that does not, and has no bound but the cube of pixel values; pixels are rounded to 256
    levels; `epsilon` bounds the result, which is rounded again. An image whose vote was never fooled is returned as it
    is. If a gradient is 0, a direction is drawn from the generator.
    """
    import torch

    delta = torch.zeros_like(x)
    norm, farthest = x.new_full((len(x),), epsilon), torch.maximum(x, 1 - x).flatten(1).norm(dim=1)
    best, best_norm = delta, farthest
    for step in range(steps):
        gradient, fooled = _gradient(loss, x + delta)
        length = delta.flatten(1).norm(dim=1)
        better = fooled & (length < best_norm)
        best, best_norm = torch.where(_wide(better), delta, best), torch.where(better, length, best_norm)
        steepness = gradient.flatten(1).norm(dim=1)
        random = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        direction = torch.where(_wide(steepness == 0), random, gradient / _wide(steepness.clamp_min(1e-30)))
        rate = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        delta = delta + rate * direction
        norm = torch.minimum(norm * torch.where(fooled, 1 - _DDN_GAMMA, 1 + _DDN_GAMMA), farthest)
        delta = _rounded(x + delta * _wide(norm / _length(delta))).clamp(0.0, 1.0) - x
    return (x + _rounded(_within(best, epsilon))).clamp(0.0, 1.0)


def _gradient(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the loss at x, and whether each image's vote is fooled there."""
    import torch

    x = x.detach().requires_grad_()
    value, fooled = loss(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return gradient, fooled


def _within(delta: Tensor, epsilon: float) -> Tensor:
    """Returns delta with each image scaled down to norm `epsilon` if it is longer."""
    return delta * _wide((epsilon / _length(delta)).clamp_max(1.0))


def _length(delta: Tensor) -> Tensor:
    """Returns the L2 norm of each image, `[B]`, or a tiny number in place of 0."""
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths.clamp_min(1e-12)


def _clipped(x: Tensor, delta: Tensor) -> Tensor:
    """Returns delta with x + delta brought into [0, 1]. No component grows, since x lies there."""
    return (x + delta).clamp(0.0, 1.0) - x


def _rounded(values: Tensor) -> Tensor:
    """Returns the nearest multiples of 1/255."""
    return (values * _DDN_LEVELS).round() / _DDN_LEVELS


def _wide(values: Tensor) -> Tensor:
    """Returns `[B]` as `[B, 1, 1, 1]`."""
    return values[:, None, None, None]


ATTACKS = {"pgd": pgd, "ddn": ddn}


def smoothadv(
    model: Logits, images: Tensor, labels: Tensor, recipe: SmoothAdvRecipe, step: Step
) -> tuple[Tensor, Sums]:
    """Returns the mean cross-entropy of `recipe.k` noisy copies per attacked image, and its sums.

    The attack sees the network in evaluation mode, and the same noise as the update. See `training.method` for shapes.
    """
    import torch
    import torch.nn.functional as F

    batch, copies = len(images), recipe.k
    noise = recipe.sigma * torch.randn(
        (batch, copies, *images.shape[1:]), generator=step.generator, device=images.device
    )
    with step.frozen() as frozen:
        attacked = ATTACKS[recipe.attack](
            lambda x: smoothed_loss(frozen, x, labels, noise),
            images,
            epsilon=recipe.epsilon * min(1.0, (step.epoch + 1) / max(1, recipe.ramp)),
            steps=recipe.attack_steps,
            generator=step.generator,
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


def _published(dataset: str, sigma: float) -> Recipe:
    """As published, a batch of 256 is made k steps of 256 / k images, each with k noisy copies."""
    near = nearest_sigma(sigma)
    if dataset == "imagenet":
        epsilon = 512 / 256 if near == 1.0 else 255 / 256
        return SmoothAdvRecipe(
            sigma, 90, 256, 0.1, 1e-4, milestones=(30, 60), k=1, epsilon=epsilon, attack_steps=1, ramp=10
        )
    if dataset == "mnist":
        return SmoothAdvRecipe(
            sigma, 90, 64, 0.01, 1e-4, milestones=(30, 60), k=4, epsilon=255 / 256, attack_steps=10, ramp=10
        )
    steps, k, epsilon = {0.25: (10, 8, 255 / 256), 0.5: (2, 8, 512 / 256), 1.0: (10, 2, 512 / 256)}[near]
    return SmoothAdvRecipe(
        sigma, 150, 256 // k, 0.1, 1e-4, milestones=(50, 100), k=k, epsilon=epsilon, attack_steps=steps, ramp=10
    )


def _fast(dataset: str, sigma: float) -> Recipe:
    """Returns this project's own fast recipe; see `docs/training.md`."""
    published = _published(dataset, sigma)
    if dataset == "mnist":
        return published.with_options(epochs=30, k=1, attack_steps=1, batch=256)
    assert isinstance(published, SmoothAdvRecipe)
    epochs, k = {"cifar10": 150, "imagenet": 30}[dataset], min(2, published.k)
    cycle = {"schedule": "one-cycle", "milestones": (), "nesterov": True, "ema": 0.998}
    few_steps = {"k": k, "attack_steps": min(2, published.attack_steps), "batch": 256 // k, "ramp": epochs // 9}
    return published.with_options(**cycle, **few_steps, epochs=epochs)


def _source(dataset: str, sigma: float) -> str | None:
    return {
        "cifar10": "Salman et al. 2019",
        "imagenet": "Salman et al. 2019",
        "mnist": "public code of Jeong & Shin 2020",
    }.get(dataset)


METHOD = Method(SmoothAdvRecipe, smoothadv, {"published": _published, "short": _published, "fast": _fast}, _source)
