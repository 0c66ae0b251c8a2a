"""MACER's loss is the paper's (Zhai et al. 2020, eqs. 8-10), and stays finite where the paper's formula does not."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from macer_serve.training.method import Step
from macer_serve.training.methods.gaussian import gaussian
from macer_serve.training.methods.macer import macer, macer_loss
from macer_serve.training.methods.smoothadv import smoothadv
from macer_serve.training.recipes import recipe

CONSTANTS = {"sigma": 0.5, "lam": 4.0, "gamma": 8.0, "beta": 16.0}
Array = npt.NDArray[np.float64]


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def paper(
    z: Array,
    labels: npt.NDArray[np.int64],
    *,
    sigma: float,
    lam: float,
    gamma: float,
    beta: float,
    label_smoothing: float = 0.0,
) -> float:
    """The loss as the paper and its code define it, one sample after the other; labels as a spread distribution."""
    total, classes = 0.0, z.shape[-1]
    for sample, label in zip(z, labels, strict=True):
        target = [label_smoothing / classes + (1.0 - label_smoothing) * (c == label) for c in range(classes)]
        mean = softmax(sample).mean(0)
        total += -sum(t * math.log(p + 1e-10) for t, p in zip(target, mean, strict=True))
        q = softmax(beta * sample).mean(0)
        t1, t0 = np.sort(q)[-2:]
        xi = ndtri(t0) - ndtri(t1)
        if q.argmax() == label and np.isfinite(xi) and xi <= gamma:
            total += lam * sigma / 2 * (gamma - xi)
    return total / len(z)


def random_case(classes: int, scale: float, batch: int = 24, copies: int = 5) -> tuple[Array, npt.NDArray[np.int64]]:
    """Logits around a class a sample, which is the label of most samples."""
    generator = np.random.default_rng([classes, round(1000 * scale)])
    z = generator.normal(0.0, scale, (batch, copies, classes))
    favoured = generator.integers(0, classes, batch)
    z[np.arange(batch), :, favoured] += 2 * scale
    wrong = (favoured + 1) % classes
    return z, np.where(generator.random(batch) < 0.7, favoured, wrong)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("scale", [0.01, 0.1, 0.5, 3.0, 40.0])
def test_it_is_the_papers_loss(classes: int, scale: float) -> None:
    z, labels = random_case(classes, scale)
    expected = paper(z, labels, **CONSTANTS)
    loss, _ = macer_loss(torch.from_numpy(z), torch.from_numpy(labels), **CONSTANTS)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    z32 = z.astype(np.float32)
    # Whether a sample counts turns on the order of its top two: a tie to eight digits may fall either way.
    second, first = np.sort(softmax(CONSTANTS["beta"] * z32.astype(np.float64)).mean(1))[:, -2:].T
    clear = first - second > 1e-6
    assert clear.sum() >= 5
    z32, labels = z32[clear], labels[clear]
    loss32, _ = macer_loss(torch.from_numpy(z32), torch.from_numpy(labels), **CONSTANTS)
    assert loss32.dtype == torch.float32
    assert loss32.item() == pytest.approx(paper(z32.astype(np.float64), labels, **CONSTANTS), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_smoothed_labels_are_a_distribution_over_the_classes(classes: int, smoothing: float) -> None:
    z, labels = random_case(classes, 0.5)
    expected = paper(z, labels, **CONSTANTS, label_smoothing=smoothing)
    assert abs(expected - paper(z, labels, **CONSTANTS)) > 1e-3
    for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        logits = torch.from_numpy(z).to(dtype)
        loss, sums = macer_loss(logits, torch.from_numpy(labels), **CONSTANTS, label_smoothing=smoothing)
        assert loss.item() == pytest.approx(expected, rel=rel)
        parts = sums["classification"] + CONSTANTS["lam"] * sums["robustness"]
        assert parts.item() == pytest.approx(len(z) * expected, rel=rel), "the logged parts are the loss's"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("classes", "scale"), [(2, 0.1), (4, 0.05), (4, 0.2), (11, 0.1)])
def test_its_gradient_is_that_of_the_papers_loss(classes: int, scale: float, smoothing: float) -> None:
    z, labels = random_case(classes, scale, batch=4, copies=3)
    logits = torch.from_numpy(z).requires_grad_()
    loss, sums = macer_loss(logits, torch.from_numpy(labels), **CONSTANTS, label_smoothing=smoothing)
    loss.backward()
    assert sums["inside"] > 0
    numerical = np.zeros_like(z)
    for at in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[at] += 1e-6
        down[at] -= 1e-6
        sides = [paper(moved, labels, **CONSTANTS, label_smoothing=smoothing) for moved in (up, down)]
        numerical[at] = (sides[0] - sides[1]) / 2e-6
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), numerical, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_autograd_agrees_with_finite_differences(smoothing: float) -> None:
    z, labels = random_case(5, 0.1, batch=3, copies=2)
    logits = torch.from_numpy(z).requires_grad_()
    targets = torch.from_numpy(labels)
    torch.autograd.gradcheck(lambda x: macer_loss(x, targets, **CONSTANTS, label_smoothing=smoothing)[0], logits)


def test_the_loss_on_saturated_votes_stays_finite_with_smoothed_labels() -> None:
    """Every class but one has probability 0, and costs -log(1e-10) for its share of the label."""
    z = torch.zeros(2, 3, 10)
    z[:, :, 4] = 1e6
    z.requires_grad_()
    loss, _ = macer_loss(z, torch.tensor([4, 0]), **CONSTANTS, label_smoothing=0.1)
    loss.backward()
    nothing = -math.log(1e-10)
    assert loss.item() == pytest.approx((0.09 * nothing + 0.99 * nothing) / 2, rel=1e-5)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("size", [50.0, 1e4, 1e6])
def test_saturated_votes_leave_loss_and_gradients_finite(dtype: torch.dtype, classes: int, size: float) -> None:
    z = torch.full((6, 4, classes), -size, dtype=dtype)
    z[0, :, 0] = size  # right, every vote
    z[1, :, 1] = size  # wrong, every vote
    z[2, :2, 0], z[2, 2:, 1] = size, size  # two votes for each of two classes
    z[3, :, 0], z[3, :, 1] = size, size - 1  # saturated at beta = 16, not at 1
    z[4, :3, 0], z[4, 3, 1] = size, size  # three votes against one: xi = 1.35
    # z[5] is uniform: every class ties
    labels = torch.zeros(6, dtype=torch.int64)
    z.requires_grad_()
    loss, sums = macer_loss(z, labels, **CONSTANTS)
    loss.backward()
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert all(torch.isfinite(value) for value in sums.values())
    assert z.grad[0].abs().max() < 1e-20, "a saturated right sample has nothing left to learn"
    # Samples 2, 4 and 5 are right with xi of 0, Phi^-1(3/4) - Phi^-1(1/4) and (2 classes or more) 0.
    assert [int(sums[name]) for name in ("correct", "inside", "saturated")] == [5, 3, 2]
    hinges = [8.0, 8.0 - 2 * ndtri(0.75), 8.0]
    assert sums["robustness"].item() == pytest.approx(0.25 * sum(hinges), rel=1e-5)
    expected = [0.0, -math.log(1e-10), -math.log(0.5), math.log1p(math.exp(-1)), -math.log(0.75), math.log(classes)]
    assert sums["classification"].item() == pytest.approx(sum(expected), rel=1e-4)


def test_a_batch_of_nothing_but_saturated_samples() -> None:
    for label, loss_of_one in ((3, 0.0), (4, -math.log(1e-10))):
        z = torch.zeros(5, 16, 10)
        z[:, :, 3] = 1e4
        z.requires_grad_()
        loss, sums = macer_loss(z, torch.full((5,), label), **CONSTANTS)
        loss.backward()
        assert loss.item() == pytest.approx(loss_of_one, abs=1e-6)
        assert z.grad is not None
        assert torch.isfinite(z.grad).all()
        assert int(sums["inside"]) == 0
        assert int(sums["saturated"]) == (5 if label == 3 else 0)


def test_samples_are_summed_and_divided_by_the_batch() -> None:
    z, labels = random_case(10, 0.1)
    z[::3] *= 1e5  # saturated neighbours change nothing for the others
    logits = torch.from_numpy(z).requires_grad_()
    loss, sums = macer_loss(logits, torch.from_numpy(labels), **CONSTANTS)
    loss.backward()
    assert logits.grad is not None
    alone = 0.0
    totals: dict[str, float] = dict.fromkeys(sums, 0.0)
    for index in range(len(z)):
        one = torch.from_numpy(z[index : index + 1]).requires_grad_()
        loss_of_one, sums_of_one = macer_loss(one, torch.from_numpy(labels[index : index + 1]), **CONSTANTS)
        loss_of_one.backward()
        assert one.grad is not None
        torch.testing.assert_close(logits.grad[index], one.grad[0] / len(z), rtol=1e-9, atol=1e-15)
        alone += loss_of_one.item()
        for name, value in sums_of_one.items():
            totals[name] += value.item()
    assert loss.item() == pytest.approx(alone / len(z), rel=1e-12)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(totals, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 4.0, 8.0])
def test_the_hinge_ends_exactly_at_gamma(gamma: float) -> None:
    def of(xi: float) -> dict[str, float]:
        p = ndtr(xi / 2)  # two classes, one copy: xi = 2 Phi^-1(p)
        z = torch.tensor([[[math.log(p / (1 - p)), 0.0]]], dtype=torch.float64)
        loss, sums = macer_loss(z, torch.zeros(1, dtype=torch.int64), sigma=0.5, lam=3.0, gamma=gamma, beta=1.0)
        return {"loss": loss.item(), **{name: value.item() for name, value in sums.items()}}

    below, above = of(gamma - 1e-6), of(gamma + 1e-6)
    assert (below["inside"], below["saturated"]) == (1, 0)
    assert (above["inside"], above["saturated"]) == (0, 1)
    assert below["robustness"] == pytest.approx(0.25 * 1e-6, rel=1e-3)
    assert above["robustness"] == 0.0
    assert above["loss"] == above["classification"]
    assert of(gamma / 2)["soft_radius"] == pytest.approx(0.25 * gamma / 2, rel=1e-9)
    assert above["soft_radius"] == pytest.approx(0.25 * gamma, rel=1e-12), "the radius is capped as the hinge is"


def linear(x: Tensor) -> Tensor:
    """Three logits from one-pixel images."""
    flat: Any = x.flatten(1)
    return flat[:, :1] * torch.tensor([1.0, -1.0, 0.2])


@pytest.mark.parametrize("k", [1, 4])
def test_the_method_draws_k_copies_and_defers_the_robustness_loss(k: int) -> None:
    chosen = recipe("cifar10", "macer", 0.5).with_options(k=k, defer=2, lam=5.0)
    images, labels = torch.rand((8, 1, 1, 1), generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    kept = images.clone()
    results = {}
    for epoch in (0, 1, 2, 7):
        loss, sums = macer(linear, images, labels, chosen, Step(epoch, torch.Generator().manual_seed(5), linear))
        results[epoch] = loss.item()
        robustness = chosen.lam * sums["robustness"] if epoch >= 2 else 0.0
        assert loss.item() == pytest.approx(((sums["classification"] + robustness) / 8).item(), rel=1e-6)
        assert sums["loss"].item() == pytest.approx(8 * loss.item(), rel=1e-6)
        assert sums["robustness"] > 0
    assert results[0] == results[1] != results[2] == results[7]
    assert torch.equal(images, kept), "the images themselves are not touched"

    noise = torch.randn((8 * k, 1, 1, 1), generator=torch.Generator().manual_seed(5))
    noisy = images.repeat_interleave(k, 0) + 0.5 * noise
    expected, _ = macer_loss(linear(noisy).view(8, k, 3), labels, sigma=0.5, lam=5.0, gamma=8.0, beta=16.0)
    assert results[2] == pytest.approx(expected.item(), rel=1e-6), "copy j of image i is row i k + j"


def test_gaussian_augmentation_is_cross_entropy_on_one_noisy_copy() -> None:
    chosen = recipe("cifar10", "gaussian", 0.5)
    images, labels = torch.rand((8, 1, 1, 1), generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    loss, sums = gaussian(linear, images, labels, chosen, Step(0, torch.Generator().manual_seed(5), linear))
    noisy = images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    p = softmax(linear(noisy).double().numpy())
    expected = -np.log(p[np.arange(8), labels.numpy()]).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert sums["loss"].item() == pytest.approx(8 * expected, rel=1e-6)
    assert int(sums["noisy_correct"]) == (p.argmax(1) == labels.numpy()).sum()


def smoothed_cross_entropy(logits: Array, labels: npt.NDArray[np.int64], smoothing: float) -> float:
    """The mean cross-entropy against labels of which `smoothing` is spread over all classes."""
    log_p = np.log(softmax(logits))
    of_label = log_p[np.arange(len(labels)), labels]
    return float(-((1 - smoothing) * of_label + smoothing * log_p.mean(1)).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_label_smoothing_of_gaussian_augmentation_and_of_smoothadv(smoothing: float) -> None:
    images, labels = torch.rand((8, 1, 1, 1), generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    for method, copies in ((gaussian, 1), (smoothadv, 3)):
        chosen = recipe("cifar10", method.__name__, 0.5).with_options(label_smoothing=smoothing)
        if copies > 1:
            chosen = chosen.with_options(k=copies, attack_steps=0)
        step = Step(0, torch.Generator().manual_seed(5), lambda: nullcontext(linear))
        loss, sums = method(linear, images, labels, chosen, step)
        noise = torch.randn((8 * copies, 1, 1, 1), generator=torch.Generator().manual_seed(5))
        logits = linear(images.repeat_interleave(copies, 0) + 0.5 * noise).double().numpy()
        expected = smoothed_cross_entropy(logits, labels.repeat_interleave(copies).numpy(), smoothing)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert sums["loss"].item() == pytest.approx(8 * expected, rel=1e-6)


def test_the_attack_of_smoothadv_knows_nothing_of_smoothed_labels() -> None:
    images, labels = torch.rand((8, 1, 1, 1), generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
    norms = []
    for smoothing in (0.0, 0.6):
        options = {"k": 2, "attack_steps": 3, "epsilon": 0.2, "label_smoothing": smoothing}
        chosen = recipe("cifar10", "smoothadv", 0.5).with_options(**options)
        step = Step(20, torch.Generator().manual_seed(5), lambda: nullcontext(linear))
        _, sums = smoothadv(linear, images, labels, chosen, step)
        norms.append(sums["attack_norm"].item())
    assert norms[0] == norms[1] > 0


@pytest.mark.parametrize(("k_deferred", "copies"), [(0, [8, 8, 8]), (1, [1, 1, 8]), (2, [2, 2, 8])])
def test_deferred_epochs_take_the_copies_of_their_own(k_deferred: int, copies: list[int]) -> None:
    chosen = recipe("cifar10", "macer", 0.5).with_options(k=8, defer=2, k_deferred=k_deferred)
    images, labels, seen = torch.rand(6, 1, 1, 1), torch.arange(6) % 3, []

    def counting(x: Tensor) -> Tensor:
        seen.append(len(x) // len(images))
        return linear(x)

    for epoch in range(3):
        _, sums = macer(counting, images, labels, chosen, Step(epoch, torch.Generator().manual_seed(5), linear))
        assert sums["noisy_correct"] <= len(images), "a share of the copies, whatever their number"
    assert seen == copies == [chosen.copies(epoch) for epoch in range(3)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_deferred_with_one_copy_macer_is_gaussian_augmentation(smoothing: float) -> None:
    """Loss, gradient and noise: the first part of a run is the other method's."""
    shared = {"label_smoothing": smoothing}
    deferred = recipe("cifar10", "macer", 0.5).with_options(k=8, defer=2, k_deferred=1, **shared)
    plain = recipe("cifar10", "gaussian", 0.5).with_options(**shared)
    images, labels = torch.rand((30, 1, 2, 2), generator=torch.Generator().manual_seed(1)), torch.arange(30) % 5
    weights = torch.randn((4, 5), generator=torch.Generator().manual_seed(2))
    found = []
    for method, chosen in ((macer, deferred), (gaussian, plain)):
        w = weights.clone().requires_grad_()
        step = Step(1, torch.Generator().manual_seed(5), linear)
        loss, sums = method(lambda x, w=w: x.flatten(1) @ w, images, labels, chosen, step)
        loss.backward()
        assert w.grad is not None
        found.append((loss.item(), w.grad, sums["noisy_correct"].item(), sums["loss"].item()))
    (loss, gradient, correct, total), (other_loss, other_gradient, other_correct, other_total) = found
    assert loss == pytest.approx(other_loss, rel=1e-6)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-5, atol=1e-7)
    assert correct == other_correct
    assert total == pytest.approx(other_total, rel=1e-6)


def test_one_copy_without_robustness_loss_is_cross_entropy_but_for_what_is_added_to_the_probability() -> None:
    z, labels = random_case(10, 9.0, copies=1)
    loss, _ = macer_loss(torch.from_numpy(z), torch.from_numpy(labels), **{**CONSTANTS, "lam": 0.0})
    p = softmax(z[:, 0])[np.arange(len(z)), labels]
    assert p.min() < 1e-9, "the addition is in play"
    assert loss.item() + np.log1p(1e-10 / p).mean() == pytest.approx(-np.log(p).mean(), abs=1e-13)
