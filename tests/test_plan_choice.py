"""Whoever chooses among answers to the same votes gains nothing; what could be gained is not offered.

Exact first-passage probabilities: of counts of n votes, each for the class with probability p, the share of paths that
ever meet a lower bound above p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pytest
from scipy.stats import binom

from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove

N, PS = 300, (0.55, 0.8, 0.97)


def p_lower(plan: Plan, k: int, m: int) -> float:
    return prove(plan, np.array([k, m - k]), 0, sigma=0.25, tau=0.0).p_lower


def first_false(bound: Callable[[int, int], float], m: int, p: float, least: int) -> int:
    """The smallest count of m votes, not below `least`, at which the bound exceeds p; it rises with the count."""
    low, high, step = least - 1, least, 1
    while high <= m and bound(high, m) <= p:
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        k = (low + high) // 2
        low, high = (k, high) if k <= m and bound(k, m) <= p else (low, k)
    return high


def ever_false(looks: Iterable[tuple[int, Callable[[int, int], float]]], p: float) -> float:
    """The probability that any of the bounds, each looked at after so many votes, exceeds p."""
    paths, at, false, k = np.ones(1), 0, 0.0, 0
    for m, bound in looks:
        if m > at:
            paths, at = np.convolve(paths, binom.pmf(np.arange(m - at + 1), m - at, p)), m
        else:
            k = 0  # another bound
        k = first_false(bound, m, p, k)
        false += float(paths[k:].sum())
        paths[k:] = 0.0
    return false


def every_answer(alpha: float) -> list[tuple[int, Callable[[int, int], float]]]:
    """All that radius and tolerance plans, caps, deadlines and streams can say: the bound after every single vote."""
    plan = Plan(n=N, alpha=alpha, radius=0.25)
    return [(m, partial(p_lower, plan)) for m in range(1, N + 1)]


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("p", PS)
def test_choosing_among_radii_tolerances_caps_and_moments_stays_within_alpha(alpha: float, p: float) -> None:
    by_radius, by_tolerance = (Plan(n=N, alpha=alpha, **kind) for kind in ({"radius": 0.25}, {"tolerance": 0.1}))
    assert p_lower(by_radius, 250, N) == p_lower(by_tolerance, 250, N)
    assert p_lower(by_radius, 150, 160) == p_lower(by_tolerance, 150, 160)
    assert ever_false(every_answer(alpha), p) <= alpha


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_fixed_plan_beside_the_others_would_exceed_it(alpha: float) -> None:
    """Therefore a served model offers one or the other: 0.8 alpha is spent at all looks, and alpha again at n."""
    both = ever_false([*every_answer(alpha), (N, partial(p_lower, Plan(n=N, alpha=alpha)))], 0.55)
    assert 1.05 * alpha < both <= 1.8 * alpha


@pytest.mark.parametrize(
    "plan", [{}, {"radius": 0.25}, {"bound": "two-sided"}, {"bound": "two-sided", "tolerance": 0.1}]
)
def test_a_smaller_alpha_never_proves_more(plan: dict[str, object]) -> None:
    for k in (150, 180, 270, 299, 300):
        bounds = [p_lower(Plan(n=N, alpha=alpha, **plan), k, N) for alpha in (0.05, 0.01, 0.001)]  # type: ignore[arg-type]
        assert bounds == sorted(bounds, reverse=True)


def test_the_best_of_ten_clopper_pearson_bounds_is_false_several_times_too_often() -> None:
    """Whoever may choose n in a library must choose it beforehand."""
    alpha = 0.001
    looks = [(m, partial(p_lower, Plan(n=m, alpha=alpha))) for m in range(1000, 10_001, 1000)]
    assert 4 * alpha < ever_false(looks, 0.8) < 6 * alpha
