"""Fresh votes contradict a true claim with at most the stated probability: exactly, over all outcomes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.contradiction import LEVEL, evidence_against
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import SOFT_LEVELS, Votes


def contradicts(plan: Plan, proof: Proof, top: int, votes: Votes) -> bool:
    return any(e.contradicts for e in evidence_against(plan, proof, top, votes, tau=0.0))


@pytest.mark.parametrize("p", [0.51, 0.7, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("n", [50, 1000])
def test_the_false_alarm_of_one_sided_claims(p: float, n: int) -> None:
    """The claim p_A >= p is just true: the exact probability of calling it contradicted, over all outcomes."""
    proof = Proof(1, 0.1, p, 1.0 - p)
    alarm = [contradicts(Plan(), proof, 1, np.array([n - k, k])) for k in range(n + 1)]
    probability = float(binom.pmf(np.flatnonzero(alarm), n, p).sum())
    assert probability <= LEVEL
    if n == 1000 and p < 0.999:
        assert probability > LEVEL / 3  # not vacuous: at three times the level it would fail
        assert alarm[int(n * (p - 6 * np.sqrt(p * (1 - p) / n)))]


def outcomes(n: int) -> Iterator[tuple[int, int, int]]:
    return ((a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a))


@pytest.mark.parametrize(
    ("plan", "p", "claim"),
    [
        (Plan(bound="two-sided"), (0.25, 0.5, 0.25), (0.5, 0.25)),
        (Plan(bound="two-sided"), (0.4, 0.45, 0.15), (0.45, 0.4)),
        (Plan(bound="two-sided"), (0.1, 0.8, 0.1), (0.8, 0.1)),
        (Plan(mode="predict"), (0.45, 0.45, 0.1), (0.0, 1.0)),
        (Plan(mode="predict"), (1 / 3, 1 / 3, 1 / 3), (0.0, 1.0)),
    ],
)
def test_the_false_alarm_of_other_claims(plan: Plan, p: tuple[float, ...], claim: tuple[float, float]) -> None:
    n = 60
    proof = Proof(1, 0.0, *claim)
    bad = [v for v in outcomes(n) if contradicts(plan, proof, 1, np.array(v))]
    assert len(bad) > 0
    assert LEVEL / 50 < float(multinomial.pmf(bad, n, p).sum()) <= LEVEL


@pytest.mark.parametrize(("low", "high"), [(100, 900), (0, 1023), (400, 600)])
def test_the_false_alarm_of_soft_claims(low: int, high: int) -> None:
    """z takes two values just inside its levels; the claimed means are the true ones, the probability exact."""
    n, p = 300, 0.8
    mean = (p * high + (1 - p) * low) / SOFT_LEVELS  # as low as it may be for these levels
    worst = mean + 1 / SOFT_LEVELS  # and as high
    plan = Plan(bound="soft")
    probability = 0.0
    for k in range(n + 1):
        votes = np.zeros((3, SOFT_LEVELS), np.int64)
        votes[:, low] += n - k
        votes[:, high] += k
        above = contradicts(plan, Proof(1, 0.1, worst, 1.0), 1, votes)
        below = contradicts(plan, Proof(1, 0.1, 0.0, mean), 1, votes)
        assert not (above and below)
        probability += float(binom.pmf(k, n, p)) * (above or below)
    assert probability <= LEVEL
    votes[:] = 0
    votes[:, low] = n
    assert contradicts(plan, Proof(1, 0.1, worst, 1.0), 1, votes)
