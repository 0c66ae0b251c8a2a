"""End to end: radii against a truth in closed form, through the library and the real voter.

f = [w.z >= t] with integer w (gcd g) on lattice inputs. Under exact noise the smoothed classifier's boundary is
w.z = t - g/2, so that the true radius is R* = |w.x - (t - g/2)| / (255 ||w||). A certificate is false where its class
is wrong or its radius exceeds R*; the share of false ones must be consistent with alpha. Exact binomial tests, fixed
seeds, false-alarm rate 1e-6 each; and each kind of broken bound must fail the very same test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cases import voter_of
from linear_problems import (
    ANYWHERE,
    COLOUR,
    CONFIDENT,
    FALSE_ALARM,
    GCD3,
    GREY,
    SIGMA,
    Problem,
    margins,
)
from scipy.special import ndtri
from scipy.stats import binom
from torch import Tensor, nn

from macer_serve.architectures import base_classifier
from macer_serve.errors import EngineError, ParameterError
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.certification import Certification, Claim, Done, Waiting
from macer_serve.smoothing.noise import FRACTION_BITS, FixedPoint
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.radius import one_sided_radius, round_down
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.voters import Task
from macer_serve.voters.batched import BatchedVoter
from macer_serve.voters.options import Precision


@pytest.fixture(scope="module", params=["torch", "onnx", "openvino"])
def colour(request: pytest.FixtureRequest) -> Iterator[SmoothedClassifier]:
    for g in COLOUR.classifier(500, request.param):
        assert g.voter is not None
        assert g.voter.engine.startswith(f"{request.param}-cpu-fp32-")
        yield g


@pytest.fixture(scope="module")
def gcd3() -> Iterator[SmoothedClassifier]:
    yield from GCD3.classifier(500)


@pytest.fixture(scope="module")
def grey() -> Iterator[SmoothedClassifier]:
    yield from GREY.classifier(500)


def false_certificates(
    g: SmoothedClassifier, problem: Problem, plan: Plan, runs: int, shares: tuple[float, ...]
) -> int:
    """Of `runs` certifications, each of an image of its own: how many claim a wrong class or too large a radius."""
    generator, levels = np.random.default_rng(12345), margins(problem, plan, shares)
    false, seen, certified = 0, set(), 0
    for i in range(runs):
        image = problem.image(levels[i % len(levels)], generator)
        seen.add(image.tobytes())
        class_id, radius, at_upload = problem.truth(image)
        certificate = g.certify(image, plan)
        certified += not certificate.abstained
        false += not certificate.abstained and (
            certificate.class_id != class_id or certificate.radius > radius or certificate.upload_radius > at_upload
        )
    assert len(seen) == runs
    assert certified > 0.2 * runs or not shares  # abstaining always would be sound, too
    return false


def assert_sound(
    g: SmoothedClassifier, problem: Problem, plan: Plan, runs: int, shares: tuple[float, ...] = ANYWHERE
) -> None:
    """The one test of soundness: P(at least so many false ones | each with probability alpha) is not below 1e-6."""
    false = false_certificates(g, problem, plan, runs, shares)
    p = float(binom.sf(false - 1, runs, plan.alpha))
    assert p >= FALSE_ALARM, f"{false} of {runs} certificates are false at alpha = {plan.alpha}: p = {p:.2g}"


AT_5_PERCENT, AT_1_PERMILLE = Plan(n0=100, n=400, alpha=0.05), Plan(n0=100, n=400, alpha=0.001)
MOSTLY_SELECTION = Plan(n0=400, n=100, alpha=0.05)


@pytest.mark.parametrize(
    ("plan", "shares"),
    [(AT_5_PERCENT, ANYWHERE), (AT_1_PERMILLE, ANYWHERE), (AT_1_PERMILLE, CONFIDENT)],
    ids=["alpha=0.05", "alpha=0.001", "alpha=0.001, confident"],
)
def test_false_certificates_are_no_more_than_alpha(
    colour: SmoothedClassifier, plan: Plan, shares: tuple[float, ...]
) -> None:
    assert_sound(colour, COLOUR, plan, 2000, shares)


def test_the_boundary_lies_half_a_gcd_below_the_threshold(gcd3: SmoothedClassifier) -> None:
    assert_sound(gcd3, GCD3, AT_5_PERCENT, 1000)


def test_off_the_lattice_and_for_the_users_own_pixels(grey: SmoothedClassifier) -> None:
    """Grey is the mean of three channels: x lies off the lattice, and upload_radius is the larger one."""
    image = GREY.image(1.0, np.random.default_rng(1))
    assert (grey.question(image).x % (1 << FRACTION_BITS) != 0).any()
    assert_sound(grey, GREY, AT_5_PERCENT, 2000)


def test_selection_by_most_of_the_votes_is_sound(colour: SmoothedClassifier) -> None:
    assert_sound(colour, COLOUR, MOSTLY_SELECTION, 1500, ())


# --- the test notices ------------------------------------------------------------------------------------------------


def three_alpha(k: int, n: int, alpha: float) -> float:
    return clopper_pearson_lower(k, n, 3 * alpha)


def wald(k: int, n: int, alpha: float) -> float:
    """The normal approximation: good near 1/2, far too sure of confident images."""
    p = k / n
    return p + float(ndtri(alpha)) * math.sqrt(p * (1 - p) / n) if k < n else clopper_pearson_lower(k, n, alpha)


@pytest.mark.parametrize(
    ("broken", "plan", "shares"),
    [(three_alpha, AT_5_PERCENT, ANYWHERE), (wald, AT_1_PERMILLE, CONFIDENT)],
    ids=["three alpha", "normal approximation"],
)
def test_broken_bounds_are_caught(
    colour: SmoothedClassifier,
    broken: Callable[[int, int, float], float],
    plan: Plan,
    shares: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """(At alpha = 0.001 two thousand runs cannot tell alpha from three alpha; tests/test_bounds.py can, exactly.)"""
    monkeypatch.setattr("macer_serve.smoothing.confidence.clopper_pearson_lower", broken)
    with pytest.raises(AssertionError, match="certificates are false"):
        assert_sound(colour, COLOUR, plan, 2000, shares)


def claiming(claim: Claim, sigma: float, p_lower: float) -> Claim:
    return dataclasses.replace(
        claim,
        class_id=claim.top_class if p_lower > 0.5 else None,
        p_lower=p_lower,
        radius=round_down(one_sided_radius(p_lower, sigma)),
    )


class Reusing(Certification):
    """Counts the selection votes again in the estimate: a real bug of published code."""

    def claim(self) -> Claim:
        claim = super().claim()
        assert claim.top_class is not None
        k = claim.votes[claim.top_class] + claim.selection_votes[claim.top_class]
        return claiming(claim, self.sigma, clopper_pearson_lower(k, self.plan.n0 + self.plan.n, self.plan.alpha))


class Peeking(Certification):
    """Takes the best Clopper-Pearson bound after every ten votes."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.peeks: list[tuple[int, ...]] = []

    def wants(self, size: int | None = None) -> Draw | Waiting | Done:
        return super().wants(min(size or 10, 10))

    def add(self, draw: Draw, votes: npt.ArrayLike) -> None:
        super().add(draw, votes)
        self.peeks.append(super().claim().votes)

    def claim(self) -> Claim:
        claim, alpha = super().claim(), self.plan.alpha
        assert claim.top_class is not None
        best = max(clopper_pearson_lower(v[claim.top_class], sum(v), alpha) for v in self.peeks if sum(v) > 0)
        return claiming(claim, self.sigma, best)


@pytest.mark.parametrize(
    ("broken", "plan", "shares"),
    [
        (Reusing, MOSTLY_SELECTION, ()),
        (Peeking, AT_5_PERCENT, (0.6, 0.8)),
    ],
    ids=["selection votes reused", "peeked at"],
)
def test_broken_runs_are_caught(
    colour: SmoothedClassifier,
    broken: type[Certification],
    plan: Plan,
    shares: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("macer_serve.smoothed.Certification", broken)
    with pytest.raises(AssertionError, match="certificates are false"):
        assert_sound(colour, COLOUR, plan, 600 if broken is Peeking else 1500, shares)


# --- votes are the copies' own ---------------------------------------------------------------------------------------


def lenet() -> nn.Sequential:
    """Randomly initialised; its biases are set so that several classes win under noise."""
    torch.manual_seed(0)
    model = base_classifier("lenet", classes=10, input_shape=(1, 28, 28), mean=(0.5,), std=(0.5,)).eval()
    with torch.inference_mode():
        mean = model(0.5 + SIGMA * torch.randn(200, 1, 28, 28)).mean(0)
    network = model[1]
    with torch.no_grad():
        network.fc.bias -= mean  # type: ignore[union-attr, operator]
    return model


@pytest.fixture(scope="module", params=[("fp32", False), ("bf16", True)], ids=["fp32", "bf16-compiled"])
def voter(request: pytest.FixtureRequest) -> Iterator[BatchedVoter]:
    precision: Precision
    precision, compiled = request.param
    options = {"device": "cpu", "batch": 32, "workers": 2, "precision": precision, "compile": compiled}
    with voter_of(lenet(), input_shape=(1, 28, 28), sigma=SIGMA, **options) as voter:
        yield voter


def inputs() -> list[FixedPoint]:
    generator = np.random.default_rng(3)
    on = [generator.integers(0, 256, (28, 28, 1), dtype=np.int32) << FRACTION_BITS for _ in range(2)]
    return [*on, generator.integers(0, 255 << FRACTION_BITS, (28, 28, 1), dtype=np.int32)]


def test_votes_do_not_depend_on_what_is_computed_beside_them(voter: BatchedVoter) -> None:
    """Not on splitting, batch mates, order, padding, nor the worker: each copy's winner is found in every setting."""
    a, b, c = inputs()
    seeds = [bytes([i]) * 16 for i in range(3)]

    def task(x: FixedPoint, seed: bytes, start: int, stop: int) -> Task:
        return Task(x, seed, Draw("estimation", start, stop))

    # One copy a pass, the rest of it padding.
    alone = [voter.submit([task(a, seeds[0], j, j + 1)]).result()[0] for j in range(40)]
    assert all(v.sum() == 1 and v.dtype == np.int64 for v in alone)
    total = sum(alone)
    assert isinstance(total, np.ndarray)
    assert (total > 0).sum() >= 3  # several classes win: the comparison says something

    def equal(votes: Votes, start: int, stop: int) -> None:
        np.testing.assert_array_equal(votes, np.sum(alone[start:stop], axis=0))

    equal(voter.submit([task(a, seeds[0], 0, 40)]).result()[0], 0, 40)  # more than a pass
    for cut in (1, 7, 31):
        pieces = [task(a, seeds[0], s, min(s + cut, 40)) for s in range(0, 40, cut)]
        for piece, votes in zip(pieces, voter.submit(pieces[::-1]).result()[::-1], strict=True):
            equal(votes, piece.draw.start, piece.draw.stop)
    # Other inputs before and behind, in passes of both workers at once.
    mates = [task(b, seeds[1], 0, 5), task(a, seeds[0], 11, 24), task(c, seeds[2], 3, 13), task(a, seeds[0], 24, 40)]
    reference = [voter.submit([mate]).result()[0] for mate in mates]
    for shift in range(4):
        order = [(i + shift) % 4 for i in range(4)]
        futures = [voter.submit([mates[i] for i in order]) for _ in range(4)]
        for future in futures:
            for i, votes in zip(order, future.result(), strict=True):
                np.testing.assert_array_equal(votes, reference[i])
    equal(reference[1], 11, 24)
    equal(reference[3], 24, 40)


def test_seed_and_purpose_do_change_the_votes(voter: BatchedVoter) -> None:
    a = inputs()[0]
    seen = {
        tuple(voter.submit([Task(a, seed, Draw(purpose, 0, 400))]).result()[0].tolist())
        for seed in (bytes(16), bytes([1]) * 16)
        for purpose in ("selection", "estimation")
    }  # type: ignore[misc, unused-ignore]
    assert len(seen) == 4


def test_replicas_agree_whatever_their_number_of_workers() -> None:
    options = {"device": "cpu", "batch": 32, "precision": "fp32", "compile": False}
    task = Task(inputs()[2], bytes(16), Draw("estimation", 0, 200))
    voters = [voter_of(lenet(), input_shape=(1, 28, 28), sigma=SIGMA, workers=k, **options) for k in (1, 2)]  # type: ignore[arg-type]
    votes = [v.submit([task]).result()[0] for v in voters]
    for v in voters:
        v.close()
    assert voters[0].engine == voters[1].engine
    np.testing.assert_array_equal(votes[0], votes[1])


class BatchMaximum(nn.Module):
    """Compares each copy with the brightest of its batch: any permutation of the rows permutes its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        brightness = x.flatten(1).sum(1, keepdim=True)
        return self.fc(brightness - brightness.amax(0, keepdim=True))  # type: ignore[no-any-return]


class BatchStatistics(nn.Module):
    """Batch normalisation without running statistics takes those of the batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(48, track_running_stats=False), nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.flatten(1)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [BatchMaximum, BatchStatistics])
def test_a_network_that_mixes_the_batch_is_refused(network: type[nn.Module]) -> None:
    """Its votes would not be independent, and Clopper-Pearson void."""
    with pytest.raises(EngineError, match="position in the batch"):
        voter_of(
            nn.Sequential(nn.Identity(), network()), input_shape=(3, 4, 4), sigma=SIGMA,
            device="cpu", batch=32, workers=1, precision="fp32", compile=False,
        )  # fmt: skip


def test_an_input_of_another_shape_is_refused(colour: SmoothedClassifier) -> None:
    """NumPy would broadcast it, and its pixels would share their noise."""
    assert colour.voter is not None
    with pytest.raises(ParameterError, match="shape"):
        colour.voter.submit([Task(np.zeros((1, 1, 3), np.int32), bytes(16), Draw("estimation", 0, 5))])


def test_a_voter_with_other_noise_than_certificates_state_is_refused(colour: SmoothedClassifier) -> None:
    with pytest.raises(EngineError, match="sigma"):
        SmoothedClassifier(dataclasses.replace(colour.config, sigma=0.5), voter=colour.voter)
    with pytest.raises(EngineError, match="exact-lattice"):
        SmoothedClassifier(colour.config, voter=colour.voter, noise="gaussian")
    with pytest.raises(EngineError, match="classes"):
        SmoothedClassifier(dataclasses.replace(colour.config, classes=("a", "b", "c")), voter=colour.voter)
