"""End to end, like test_soundness.py: plans that stop early, two-sided and soft bounds, and PREDICT.

*Two-sided*: ten classes along one direction of integer weights (gcd 1), S = w.z of the noisy copy's integers z: A
below a1, B from a2 on, and what lies between shared by eight others, by S mod 8. S is symmetric about w.x, so that
P(A) = P(S <= a1 - 1) meets P(B) = P(S >= a2) at w.x = (a1 + a2 - 1) / 2, half a lattice step below the middle; none of
the eight leads there. R* is the distance to that hyperplane, and the theorem's own radius: the bound is not slack.

*Soft*: two classes, logits 0 and c (S - t + 1/2): the softmax is antisymmetric about t - 1/2 and S symmetric about w.x,
so that the smoothed boundary is w.x = t - 1/2, as of hard votes, at any beta.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cases import voter_of
from linear_problems import COLOUR, FALSE_ALARM, SIGMA, Problem
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from torch import Tensor, nn

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing import mixture
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.plan import Plan

NORM = COLOUR.norm
SCALE = 255 * SIGMA * NORM  # the standard deviation of S, but for rounding
GAP = 2 * round(0.25 * SCALE)  # a2 - a1: under noise a fifth of the copies fall into it, at the boundary
RUNS = {"torch": 600, "onnx": 200, "openvino": 200}  # the engines' votes of these networks are equal


@pytest.fixture(scope="module", autouse=True)
def _remembered() -> Iterator[None]:
    """The bound is a pure function of few numbers of votes: it is computed once for each of them."""
    original, known = mixture.lower, dict[Any, float]()

    def lower(counts: mixture.Counts, levels: mixture.Levels, alpha: float, horizon: int) -> float:
        if len(levels) > 2:
            return original(counts, levels, alpha, horizon)
        key = counts.tobytes(), levels.tobytes(), alpha, horizon
        if key not in known:
            known[key] = original(counts, levels, alpha, horizon)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "lower", lower)
        yield


class Direction(nn.Module):
    """Logits of S = w.z; every partial sum in fp32 is an integer below 2^23. What follows S is left to `of`."""

    def __init__(self, weights: npt.NDArray[np.int64], last: Tensor) -> None:
        super().__init__()
        w = torch.from_numpy(weights.transpose(2, 0, 1).reshape(-1, 1).copy()).float()
        self.register_buffer("weights", w)
        self.fc = nn.Linear(last.shape[1], last.shape[0], bias=False)
        self.fc.load_state_dict({"weight": last})

    def sums(self, x: Tensor) -> Tensor:
        return torch.round(x * 255.0).flatten(1) @ self.weights  # type: ignore[operator, no-any-return]


class Bands(Direction):
    """Ten classes along the direction."""

    def __init__(self, weights: npt.NDArray[np.int64], a1: int, a2: int) -> None:
        super().__init__(weights, torch.eye(10))
        self.a1, self.a2 = float(a1), float(a2)
        self.register_buffer("classes", torch.arange(10.0))

    def forward(self, x: Tensor) -> Tensor:
        s = self.sums(x)
        between = 2.0 + torch.remainder(s - self.a1, 8.0)
        winner = torch.where(s < self.a1, torch.zeros_like(s), torch.where(s >= self.a2, torch.ones_like(s), between))
        return self.fc((winner == self.classes).float())  # type: ignore[no-any-return]


class Slope(Direction):
    """Two classes, logits 0 and (S - t + 1/2) / width."""

    def __init__(self, weights: npt.NDArray[np.int64], t: int, width: float) -> None:
        super().__init__(weights, torch.tensor([[0.0], [1.0]]))
        self.t, self.width = float(t), width

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.sums(x) - self.t + 0.5) / self.width)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Case:
    """A classifier whose smoothed class is `below` where w.x is less than t - 1/2 of the problem, else `above`."""

    g: SmoothedClassifier
    problem: Problem
    below: int
    above: int


@pytest.fixture(scope="module", params=["torch", "onnx", "openvino"], autouse=True)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def case(network: nn.Module, problem: Problem, engine: str, classes: int, below: int, above: int) -> Iterator[Case]:
    config = CheckpointConfig(
        name="linear", architecture="test", classes=tuple(f"class {c}" for c in range(classes)), input_shape=(3, 4, 4),
        mean=(0.0,) * 3, std=(1.0,) * 3, sigma=SIGMA, resize=4, files={"model.safetensors": "sha256:" + 64 * "0"},
    )  # fmt: skip
    with voter_of(
        nn.Sequential(nn.Identity(), network), input_shape=(3, 4, 4), sigma=SIGMA,
        engine=engine, batch=600, workers=1, precision="fp32", compile=False,
    ) as voter:  # fmt: skip
        yield Case(
            SmoothedClassifier(config, voter=voter, issuer=EvaluationSeed(bytes(range(32)))), problem, below, above
        )


@pytest.fixture(scope="module")
def hard(engine: str) -> Iterator[Case]:
    for g in COLOUR.classifier(600, engine):
        yield Case(g, COLOUR, 0, 1)


@pytest.fixture(scope="module")
def bands(engine: str) -> Iterator[Case]:
    """A below a1, B from a2 on: the boundary (a1 + a2 - 1) / 2 is the problem's t - 1/2."""
    network = Bands(COLOUR.weights, COLOUR.t - GAP // 2, COLOUR.t + GAP // 2)
    yield from case(network, COLOUR, engine, classes=10, below=0, above=1)


@pytest.fixture(scope="module")
def slope(engine: str) -> Iterator[Case]:
    """The softmax goes from 1/10 to 9/10 within a twentieth of the noise: soft, yet nearly the hard votes' radii."""
    yield from case(
        Slope(COLOUR.weights, COLOUR.t, width=16.0 * 0.01 * SCALE), COLOUR, engine, classes=2, below=0, above=1
    )


def false_certificates(case: Case, plan: Plan, radii: tuple[float, ...], runs: int) -> int:
    """Of `runs` certifications at these true radii, on both sides of the boundary: how many are false."""
    generator, false, certified, seen = np.random.default_rng(2024), 0, 0, set()
    steps = [0.5 + math.floor(radius * 255 * NORM) for radius in radii]
    for i in range(runs):
        margin = steps[i // 2 % len(steps)] * (1 if i % 2 else -1)
        image = case.problem.image(margin, generator)
        seen.add(image.tobytes())
        above, radius, at_upload = case.problem.truth(image)
        certificate = case.g.certify(image, plan)
        certified += not certificate.abstained
        false += not certificate.abstained and (
            certificate.class_id != (case.above if above else case.below)
            or certificate.radius > radius
            or certificate.upload_radius > at_upload
        )
    assert len(seen) == runs
    assert certified > 0.2 * runs or max(radii) < 0.01  # abstaining always would be sound, too
    return false


def assert_sound(case: Case, plan: Plan, radii: tuple[float, ...], runs: int) -> None:
    """The one test of soundness: P(at least so many false ones | each with probability alpha) is not below 1e-6."""
    false = false_certificates(case, plan, radii, runs)
    p = float(binom.sf(false - 1, runs, plan.alpha))
    assert p >= FALSE_ALARM, f"{false} of {runs} certificates are false at alpha = {plan.alpha}: p = {p:.2g}"


def plans(alpha: float) -> dict[str, tuple[str, Plan, tuple[float, ...]]]:
    """By name: the case, the plan, and true radii near which it is most easily caught."""
    options: dict[str, Any] = {"n0": 50, "n": 200, "alpha": alpha}
    sides: dict[str, Any] = {**options, "n": 120, "bound": "two-sided"}
    soft: dict[str, Any] = {**options, "n": 120, "bound": "soft"}
    edge = SIGMA * float(ndtri(clopper_pearson_lower(160, 200, 0.2 * alpha)))
    return {
        "radius": ("hard", Plan(radius=0.15, **options), (0.0, 0.149, edge)),
        "tolerance": ("hard", Plan(tolerance=0.05, **options), (0.0, edge)),
        "two-sided": ("bands", Plan(**sides), (0.05, 0.15, 0.3)),
        "two-sided radius": ("bands", Plan(radius=0.15, **sides), (0.0, 0.149, 0.3)),
        "two-sided tolerance": ("bands", Plan(tolerance=0.05, **sides), (0.05, 0.3)),
        "soft": ("slope", Plan(**soft), (0.05, 0.2)),
        "soft radius": ("slope", Plan(radius=0.15, **soft), (0.0, 0.149, 0.3)),
        "soft tolerance": ("slope", Plan(tolerance=0.05, **soft), (0.05, 0.3)),
        "predict": ("hard", Plan(n=100, alpha=alpha, mode="predict"), (0.0, 0.001)),
    }


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("name", plans(0.05))
def test_false_certificates_are_no_more_than_alpha(
    name: str, alpha: float, engine: str, request: pytest.FixtureRequest
) -> None:
    if engine != "torch" and alpha < 0.05:
        pytest.skip("the engines' votes are equal, so the larger alpha shows what an engine could break")
    fixture, plan, radii = plans(alpha)[name]
    assert_sound(request.getfixturevalue(fixture), plan, radii, RUNS[engine])


def test_the_ten_classes_have_the_boundary_they_should(bands: Case) -> None:
    """By votes: A and B are level at it, and the gap has its fifth, shared evenly."""
    image = COLOUR.image(0.5, np.random.default_rng(0))
    votes = np.array(bands.g.certify(image, Plan(n0=1, n=40_000)).votes)
    each = ndtr(-0.25)
    assert each * 40_000 == pytest.approx(votes[0], abs=500)  # five standard deviations
    assert each * 40_000 == pytest.approx(votes[1], abs=500)
    assert votes[2:] == pytest.approx((1 - 2 * each) / 8 * 40_000, abs=160)


def test_two_sided_certifies_where_no_class_has_half_of_the_votes(bands: Case) -> None:
    """And it comes close to the truth: the theorem is tight along one direction."""
    image = COLOUR.image(0.05 * 255 * NORM, np.random.default_rng(0))
    _, truth, _ = COLOUR.truth(image)
    both = bands.g.certify(image, Plan(n0=2000, n=50_000, bound="two-sided"))
    assert max(both.votes) < 25_000  # type: ignore[type-var]
    assert truth - 0.01 < both.radius <= truth
    assert bands.g.certify(image, Plan(n0=100, n=50_000)).abstained


def test_soft_comes_close_to_the_truth(slope: Case) -> None:
    image = COLOUR.image(0.2 * 255 * NORM, np.random.default_rng(0))
    _, truth, _ = COLOUR.truth(image)
    certificate = slope.g.certify(image, Plan(n0=100, n=20_000, bound="soft"))
    assert truth - 0.02 < certificate.radius <= truth


# --- the test notices -------------------------------------------------------------------------------------------------


def sure_of_the_mean(counts: mixture.Counts, levels: mixture.Levels, alpha: float, horizon: int) -> float:
    """One standard deviation below the mean, whatever alpha, at every look."""
    n = int(counts.sum())
    mean = float(counts @ levels) / n
    p = mean - math.sqrt(max(float(counts @ (levels - mean) ** 2) / n, 1.0 / n) / n)
    return math.log(p) - math.log1p(-p) if p > 0.0 else -math.inf


def sure_of_votes(k: int, n: int, alpha: float) -> float:
    return clopper_pearson_lower(k, n, 0.4)


def sure_of_the_lead(first: int, second: int) -> float:
    return 0.0 if first > second else 1.0


BROKEN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(plans(0.05), (sure_of_the_mean, "mixture.lower")),
    "two-sided": (sure_of_votes, "confidence.clopper_pearson_lower", "binomial.clopper_pearson_lower"),
    "predict": (sure_of_the_lead, "proof.top_two_p_value"),
}


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_bounds_are_caught(
    name: str, alpha: float, engine: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine != "torch":
        pytest.skip("a bound is broken alike whatever the engine")
    fixture, plan, radii = plans(alpha)[name]
    broken, *places = BROKEN[name]
    for place in places:
        monkeypatch.setattr(f"macer_serve.smoothing.{place}", broken)
    with pytest.raises(AssertionError, match="certificates are false"):
        assert_sound(request.getfixturevalue(fixture), plan, radii, 300)
