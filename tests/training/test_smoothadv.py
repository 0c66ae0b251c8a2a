"""SmoothAdv's loss and attacks are the paper's (Salman et al. 2019, eq. 6 and their code)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import Result
from torch import Tensor, nn

from macer_serve.training.method import Step
from macer_serve.training.methods.smoothadv import ATTACKS, ddn, pgd, smoothadv, smoothed_loss
from macer_serve.training.network import Group
from macer_serve.training.network import Network as Net
from macer_serve.training.precision import Precision
from macer_serve.training.recipes import recipe

Array = npt.NDArray[np.float64]
SHAPE = (3, 4, 4)
DRAWS = torch.Generator().manual_seed(0)


class Network(nn.Module):
    """Small, smooth, with a batch normalisation that betrays in which mode it was called."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def case(
    batch: int = 6, copies: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model = Network().eval().to(dtype)
    generator = torch.Generator().manual_seed(2)
    images = torch.rand((batch, *SHAPE), generator=generator).to(dtype)
    labels = model(images).argmax(1).detach()
    noise = 0.25 * torch.randn((batch, copies, *SHAPE), generator=generator).to(dtype)
    return model, images, labels, noise


def smoothed(model: nn.Module, labels: Tensor, noise: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda x: smoothed_loss(model, x, labels, noise)


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def paper(model: nn.Module, x: Array, labels: npt.NDArray[np.int64], noise: Array) -> Array:
    """J(x) = -log(mean over copies of softmax(f(x + noise))[y]), one image after the other."""
    with torch.no_grad():
        return np.array(
            [
                -math.log(np.mean([softmax(model(torch.from_numpy(u + n)[None]).numpy()[0])[y] for n in copies]))
                for u, y, copies in zip(x, labels, noise, strict=True)
            ]
        )


def test_the_attacks_loss_and_its_gradient_are_the_papers() -> None:
    model, images, labels, noise = case(batch=2)
    x = images.clone().requires_grad_()
    loss, _ = smoothed_loss(model, x, labels, noise)
    np.testing.assert_allclose(loss.detach().numpy(), paper(model, images.numpy(), labels.numpy(), noise.numpy()))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    numerical = np.zeros(images.shape)
    for at in np.ndindex(*images.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = images.numpy().copy()
            moved[at] += step
            sides.append(paper(model, moved, labels.numpy(), noise.numpy()).sum())
        numerical[at] = (sides[0] - sides[1]) / 2e-6
    np.testing.assert_allclose(gradient.numpy(), numerical, rtol=1e-5, atol=1e-8)


def test_pgd_is_the_papers_step_by_step() -> None:
    """Ascent along the normalised gradient by 2 epsilon / T, then into [0, 1], then into the ball."""
    model, images, labels, noise = case()
    epsilon, steps = 0.8, 3
    delta = np.zeros(images.shape)
    for _ in range(steps):
        x = (images + torch.from_numpy(delta)).requires_grad_()
        loss, _ = smoothed_loss(model, x, labels, noise)
        gradient = torch.autograd.grad(loss.sum(), x)[0].numpy()
        for i in range(len(images)):
            delta[i] += 2 * epsilon / steps * gradient[i] / np.linalg.norm(gradient[i])
            delta[i] = np.clip(images.numpy()[i] + delta[i], 0, 1) - images.numpy()[i]
            delta[i] *= min(1.0, epsilon / np.linalg.norm(delta[i]))
    found = pgd(smoothed(model, labels, noise), images, epsilon=epsilon, steps=steps, generator=DRAWS)
    np.testing.assert_allclose(found.numpy(), images.numpy() + delta, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 2.0])
def test_pgd_raises_the_loss_and_stays_within_its_bound(epsilon: float) -> None:
    model, images, labels, noise = case(batch=16, dtype=torch.float32)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        return smoothed_loss(model, x, labels, noise)

    attacked = pgd(loss, images, epsilon=epsilon, steps=10, generator=DRAWS)
    assert not attacked.requires_grad
    assert (attacked - images).flatten(1).norm(dim=1).max() <= epsilon * (1 + 1e-5)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (loss(attacked)[0] > loss(images)[0]).all()


def test_a_copy_votes_for_its_largest_logit() -> None:
    """Two copies of three say class 1, by little; their mean softmax says class 0."""
    logits = torch.tensor([[0.0, 0.1], [0.0, 0.1], [9.0, 0.0]])
    zeros = torch.zeros(1, *SHAPE)
    for label in (0, 1):
        loss, fooled = smoothed_loss(lambda x: logits, zeros, torch.tensor([label]), torch.zeros(1, 3, *SHAPE))
        assert fooled.item() == (label == 0)
        assert loss.item() == pytest.approx(-math.log(logits.softmax(1).mean(0)[label]))


def authors_ddn(
    model: nn.Module, x: Tensor, label: Tensor, noise: Tensor, epsilon: float, steps: int
) -> tuple[Tensor, bool]:
    """One image by the published procedure, and whether the vote was ever fooled."""
    delta, norm = torch.zeros_like(x), epsilon
    farthest = torch.maximum(x, 1 - x).norm().item()
    best, best_norm, found = torch.zeros_like(x), farthest, False
    for step in range(steps):
        at = (x + delta).requires_grad_()
        logits = model(at + noise)
        votes = logits.argmax(1).tolist()
        fooled = max(sorted(set(votes)), key=votes.count) != label.item()
        if fooled and delta.norm().item() < best_norm:
            best, best_norm, found = delta.clone(), delta.norm().item(), True
        (gradient,) = torch.autograd.grad(-logits.softmax(1).mean(0)[label].clamp(min=1e-20).log(), at)
        rate = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        delta = delta + rate * gradient / gradient.norm()
        norm = min(norm * (0.95 if fooled else 1.05), farthest)
        delta = ((x + delta * norm / delta.norm()) * 255).round().div(255).clamp(0, 1) - x
    if best.norm() > epsilon:
        best = best * epsilon / best.norm()
    return x + (best * 255).round() / 255, found


@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_ddn_is_the_authors(epsilon: float, steps: int) -> None:
    model, images, labels, noise = case(batch=24)
    images = (images * 255).round() / 255
    labels[::5] = (labels[::5] + 1) % 5  # some are fooled before they are moved
    attacked = ddn(smoothed(model, labels, noise), images, epsilon=epsilon, steps=steps, generator=DRAWS)
    assert not attacked.requires_grad
    ever = []
    for i in range(len(images)):
        expected, found = authors_ddn(model, images[i], labels[i], noise[i], epsilon, steps)
        assert (attacked[i] - expected).abs().max() < 1e-9
        assert found or torch.equal(attacked[i], images[i]), "an image that was never fooled stays as it is"
        ever.append(found)
    assert any(ever[i] for i in range(24) if i % 5) or epsilon < 1
    assert not all(ever) or epsilon > 1
    assert (attacked * 255 - (attacked * 255).round()).abs().max() < 1e-9, "256 levels"
    half_a_level = 0.5 / 255 * math.sqrt(images[0].numel())
    assert (attacked - images).flatten(1).norm(dim=1).max() <= epsilon + half_a_level


def test_ddn_leaves_a_plateau_in_a_drawn_direction() -> None:
    """A saturated network has no gradient. The direction depends on the generator alone."""

    def flat(x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.0 * x.flatten(1).sum(1), (x - 0.5).flatten(1).norm(dim=1) > 0.3

    images = torch.full((4, *SHAPE), 0.5)
    found = [
        ddn(flat, images, epsilon=0.4, steps=5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert ((found[0] - images).flatten(1).norm(dim=1) > 0.3).all()


def test_no_steps_leave_the_images_as_they_are() -> None:
    model, images, labels, noise = case()
    for attack in ATTACKS.values():
        assert torch.equal(
            attack(smoothed(model, labels, noise), images, epsilon=1.0, steps=0, generator=DRAWS),
            images,
        )


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_the_method_attacks_the_frozen_network_under_the_updates_own_noise(epoch: int, share: float) -> None:
    chosen = recipe("cifar10", "smoothadv", 0.5).with_options(k=3, attack_steps=4, epsilon=0.4, ramp=4)
    model, images, _, _ = case(dtype=torch.float32)
    labels = torch.arange(len(images)) % 5
    generator = torch.Generator().manual_seed(5)
    loss, sums = smoothadv(model, images, labels, chosen, Step(epoch, generator, lambda: nullcontext(model)))
    noise = 0.5 * torch.randn((len(images), 3, *SHAPE), generator=torch.Generator().manual_seed(5))
    attacked = pgd(smoothed(model, labels, noise), images, epsilon=0.4 * share, steps=4, generator=DRAWS)
    logits = model((attacked[:, None] + noise).flatten(0, 1)).double().detach().numpy()
    each = -np.log(softmax(logits)[np.arange(len(logits)), labels.repeat_interleave(3).numpy()])
    assert loss.item() == pytest.approx(each.mean(), rel=1e-5)
    assert sums["loss"].item() == pytest.approx(each.mean() * len(images), rel=1e-5)
    assert sums["attack_norm"].item() / len(images) == pytest.approx(0.4 * share, rel=1e-4)


def test_the_frozen_network_is_in_evaluation_mode_and_gathers_no_gradients() -> None:
    model = Network().train()
    statistics = model.layers[2].running_mean.clone()
    x = torch.rand(4, *SHAPE, requires_grad=True)
    with Net(model, Precision(torch.device("cpu"), "fp32", False, 1), Group()).frozen() as frozen:
        torch.autograd.grad(frozen(x).sum(), x)
        logits = frozen(x.detach())
        assert not model.training
    assert torch.equal(model.layers[2].running_mean, statistics), "training mode would have moved them"
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(logits, model.eval()(x.detach()))


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_trains(mnist: Any, train: Callable[..., Result], tmp_path: Any, attack: str) -> None:
    options = ("--dataset", "mnist", "--data-dir", mnist, "--method", "smoothadv", "--attack", attack)
    result = train(*options, "--epochs", 1, "--k", 2, "--attack-steps", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").exists()
