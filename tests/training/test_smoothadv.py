"""SmoothAdv's loss and attacks are the paper's (Salman et al. 2019, eq. 6; Rony et al. 2019, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import Result
from torch import Tensor, nn

from macer_serve.training.methods import Step
from macer_serve.training.methods.smoothadv import ATTACKS, ddn, pgd, smoothadv, smoothed_loss
from macer_serve.training.network import Group
from macer_serve.training.network import Network as Net
from macer_serve.training.precision import Precision
from macer_serve.training.recipes import recipe

Array = npt.NDArray[np.float64]
SHAPE = (3, 4, 4)


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
    found = pgd(lambda x: smoothed_loss(model, x, labels, noise), images, epsilon=epsilon, steps=steps)
    np.testing.assert_allclose(found.numpy(), images.numpy() + delta, atol=1e-12)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 2.0])
def test_an_attack_raises_the_loss_and_stays_within_its_bound(attack: str, epsilon: float) -> None:
    model, images, labels, noise = case(batch=16, dtype=torch.float32)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        return smoothed_loss(model, x, labels, noise)

    attacked = ATTACKS[attack](loss, images, epsilon=epsilon, steps=10)
    assert not attacked.requires_grad
    assert (attacked - images).flatten(1).norm(dim=1).max() <= epsilon * (1 + 1e-5)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    before, fooled = loss(images)
    # The image nearest to a misclassified one is itself: DDN leaves it.
    raised = loss(attacked)[0] > before
    assert (raised | (fooled if attack == "ddn" else torch.tensor(False))).all()
    assert raised.sum() >= 12


def test_ddn_prefers_the_nearest_misclassified_image() -> None:
    model, images, labels, noise = case(batch=16)

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        return smoothed_loss(model, x, labels, noise)

    far, near = pgd(loss, images, epsilon=2.0, steps=20), ddn(loss, images, epsilon=2.0, steps=40)
    fooled = loss(near)[1] & loss(far)[1]
    assert fooled.sum() > 4
    lengths = [(x - images).flatten(1).norm(dim=1)[fooled] for x in (near, far)]
    assert (lengths[0] < lengths[1]).all()


def test_no_steps_leave_the_images_as_they_are() -> None:
    model, images, labels, noise = case()
    for attack in ATTACKS.values():
        assert torch.equal(
            attack(lambda x: smoothed_loss(model, x, labels, noise), images, epsilon=1.0, steps=0), images
        )


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_the_method_attacks_the_frozen_network_under_the_updates_own_noise(epoch: int, share: float) -> None:
    chosen = recipe("cifar10", "smoothadv", 0.5).with_options(k=3, attack_steps=4, epsilon=0.4, ramp=4)
    model, images, _, _ = case(dtype=torch.float32)
    labels = torch.arange(len(images)) % 5
    loss, sums = smoothadv(model, images, labels, chosen, Step(epoch, torch.Generator().manual_seed(5), model))
    noise = 0.5 * torch.randn((len(images), 3, *SHAPE), generator=torch.Generator().manual_seed(5))
    attacked = pgd(lambda x: smoothed_loss(model, x, labels, noise), images, epsilon=0.4 * share, steps=4)
    logits = model((attacked[:, None] + noise).flatten(0, 1)).double().detach().numpy()
    each = -np.log(softmax(logits)[np.arange(len(logits)), labels.repeat_interleave(3).numpy()])
    assert loss.item() == pytest.approx(each.mean(), rel=1e-5)
    assert sums["loss"].item() == pytest.approx(each.mean() * len(images), rel=1e-5)
    assert sums["attack_norm"].item() / len(images) == pytest.approx(0.4 * share, rel=1e-4)


def test_the_frozen_network_is_in_evaluation_mode_and_gathers_no_gradients() -> None:
    model = Network().train()
    statistics = model.layers[2].running_mean.clone()
    frozen = Net(model, Precision(torch.device("cpu"), "fp32", False, 1), Group()).frozen
    x = torch.rand(4, *SHAPE, requires_grad=True)
    torch.autograd.grad(frozen(x).sum(), x)
    assert torch.equal(model.layers[2].running_mean, statistics), "training mode would have moved them"
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(frozen(x.detach()), model.eval()(x.detach()))


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_trains(mnist: Any, train: Callable[..., Result], tmp_path: Any, attack: str) -> None:
    options = ("--dataset", "mnist", "--data-dir", mnist, "--method", "smoothadv", "--attack", attack)
    result = train(*options, "--epochs", 1, "--k", 2, "--attack-steps", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").exists()
