"""The loss of consistency regularisation is the paper's (Jeong & Shin 2020, eqs. 6 and 7), with finite gradients."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from macer_serve.training.method import Step
from macer_serve.training.methods.consistency import consistency, consistency_loss
from macer_serve.training.recipes import recipe

Array = npt.NDArray[np.float64]
WEIGHTS = [(20.0, 0.5), (0.0, 0.0), (10.0, 0.0), (0.0, 0.5)]


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return np.asarray(e / e.sum(), np.float64)


def paper(z: Array, labels: npt.NDArray[np.int64], lam: float, eta: float, smoothing: float = 0.0) -> float:
    """The loss by its definition, in double precision, one image after the other; labels as spread distributions."""
    total, classes = 0.0, z.shape[-1]
    for copies, label in zip(z, labels, strict=True):
        p = [softmax(copy) for copy in copies]
        mean = sum(p, np.zeros(classes)) / len(p)
        target = np.array([smoothing / classes + (1.0 - smoothing) * (c == label) for c in range(classes)])
        cross_entropy = sum(-(target * np.log(own)).sum() for own in p) / len(p)
        divergence = sum((mean * np.log(mean / own)).sum() for own in p) / len(p)
        total += cross_entropy + lam * divergence - eta * (mean * np.log(mean)).sum()
    return float(total / len(z))


def random_case(classes: int, scale: float, batch: int = 12, copies: int = 3) -> tuple[Array, npt.NDArray[np.int64]]:
    generator = np.random.default_rng([classes, round(1000 * scale)])
    return generator.normal(0.0, scale, (batch, copies, classes)), generator.integers(0, classes, batch)


@pytest.mark.parametrize(("lam", "eta"), WEIGHTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("classes", "scale"), [(2, 0.1), (10, 3.0), (10, 30.0), (1000, 1.0)])
def test_it_is_the_papers_loss(classes: int, scale: float, smoothing: float, lam: float, eta: float) -> None:
    z, labels = random_case(classes, scale)
    expected = paper(z, labels, lam, eta, smoothing)
    for dtype, rel in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        logits = torch.from_numpy(z).to(dtype)
        loss, sums = consistency_loss(logits, torch.from_numpy(labels), lam=lam, eta=eta, label_smoothing=smoothing)
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(expected, rel=rel)
        parts = sums["classification"] + lam * sums["divergence"] + eta * sums["entropy"]
        assert parts.item() == pytest.approx(len(z) * expected, rel=rel), "the logged parts are the loss's"


@pytest.mark.parametrize(("lam", "eta"), WEIGHTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_its_gradient_is_that_of_the_papers_loss(smoothing: float, lam: float, eta: float) -> None:
    """Also through the mean of the copies, which the authors' code does not detach."""
    z, labels = random_case(4, 1.5, batch=3, copies=2)
    logits = torch.from_numpy(z).requires_grad_()
    loss, _ = consistency_loss(logits, torch.from_numpy(labels), lam=lam, eta=eta, label_smoothing=smoothing)
    loss.backward()
    numerical = np.zeros_like(z)
    for at in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[at] += 1e-5
        down[at] -= 1e-5
        sides = [paper(moved, labels, lam, eta, smoothing) for moved in (up, down)]
        numerical[at] = (sides[0] - sides[1]) / 2e-5
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), numerical, rtol=1e-6, atol=1e-8)


def test_loss_and_gradient_are_finite_for_saturated_copies() -> None:
    z = torch.zeros((2, 2, 10))
    z[0, :, 0], z[1, 0, 0], z[1, 1, 5] = 1e4, 1e4, 1e4  # copies that agree, and copies that contradict each other
    z.requires_grad_()
    loss, sums = consistency_loss(z, torch.tensor([0, 5]), lam=20.0, eta=0.5)
    loss.backward()
    assert z.grad is not None
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert sums["entropy"].item() == pytest.approx(math.log(2), rel=1e-6), "of the second image"


def test_copies_that_agree_cost_cross_entropy_and_entropy_alone() -> None:
    z, labels = random_case(10, 2.0, copies=1)
    alike = torch.from_numpy(np.repeat(z, 4, axis=1))
    loss, sums = consistency_loss(alike, torch.from_numpy(labels), lam=1e6, eta=0.0)
    assert sums["divergence"].item() == pytest.approx(0.0, abs=1e-12)
    assert loss.item() == pytest.approx(paper(z, labels, 0.0, 0.0), rel=1e-9)


def test_each_copy_has_noise_of_its_own_at_the_recipes_sigma() -> None:
    images, labels, seen = torch.rand(64, 1, 8, 8), torch.arange(64) % 10, []

    def network(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1)[:, :10]

    chosen = recipe("cifar10", "consistency", 0.5).with_options(k=3)
    loss, sums = consistency(network, images, labels, chosen, Step(0, torch.Generator().manual_seed(5), network))
    noise = seen[0].view(64, 3, 1, 8, 8) - images[:, None]
    # 12,288 normal numbers: their deviation is within 4 standard errors of sigma with probability 0.99994.
    assert noise.std().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * noise.numel()))
    assert not torch.equal(noise[:, 0], noise[:, 1])
    assert 0 <= sums["noisy_correct"] <= 64, "a share of the copies, whatever their number"
    assert sums["loss"].item() == pytest.approx(64 * loss.item(), rel=1e-6)


def test_an_untrained_network_has_the_loss_that_the_guard_against_divergence_takes() -> None:
    chosen = recipe("cifar10", "consistency", 0.25)
    loss, _ = consistency_loss(torch.zeros(4, 2, 10), torch.arange(4), lam=chosen.lam, eta=chosen.eta)
    assert loss.item() == pytest.approx(chosen.untrained_loss(10), rel=1e-6)
