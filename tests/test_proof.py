"""What whole plans claim is false at most as often as alpha: by recursion over all paths of votes, no network.

A claim's radius exceeds the true one where the votes at its look say so, which they do from some number of successes
on. So the probability that ANY look of a plan makes a false claim is a first passage: whatever a run stops for, a
deadline, a cap, a client who has seen enough, it is false no more often. And every broken bound must fail the very
same checks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from first_passage import false_probability
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import finish
from scipy.special import ndtri
from scipy.stats import binom

from macer_serve.smoothing import mixture
from macer_serve.smoothing.binomial import clopper_pearson_lower, top_two_p_value
from macer_serve.smoothing.bounds.base import MIXTURE_SHARE, Proof
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.radius import one_sided_radius, round_down, two_sided_radius
from macer_serve.smoothing.stopping import decided
from macer_serve.smoothing.votes import SOFT_LEVELS, VOTE_LEVELS, shares

SIGMA = 0.25
Votes = npt.NDArray[np.int64]


def proof(plan: Plan, *votes: int, top: int = 0) -> Proof:
    return prove(plan, np.array(votes), top, sigma=SIGMA, tau=0.0)


# --- one-sided plans --------------------------------------------------------------------------------------------------

PLANS = [
    Plan(n=400, alpha=0.05, radius=0.1),
    Plan(n=2000, alpha=0.001, radius=0.25),
    Plan(n=400, alpha=0.001, tolerance=0.1),
    Plan(n=2000, alpha=0.05, tolerance=0.05),
]
AT = [0.500001, 0.6, 0.8413447, 0.95, 0.97724987, 0.995]


def name(plan: Plan) -> str:
    return "-".join([plan.bound, plan.kind, f"n={plan.n}", f"alpha={plan.alpha:g}"])


def first_passage(fewest: dict[int, int], p: float) -> float:
    """P(at any look m the successes reach fewest[m]), by recursion over the successes of paths that have not yet."""
    alive, passed, at = np.ones(1), 0.0, 0
    for m, need in fewest.items():
        alive, at = np.convolve(alive, binom.pmf(np.arange(m - at + 1), m - at, p)), m
        passed += float(alive[need:].sum())
        alive[need:] = 0.0
    return passed


def claims_too_much(plan: Plan, looks: tuple[int, ...], p: float) -> dict[int, int]:
    """By look, the fewest votes for the class with which the plan claims a radius above the true one.

    `prove` itself is asked, at every look, by bisection: its radius rises with the votes.
    """
    truth, fewest = one_sided_radius(p, SIGMA), {}
    for m in looks:
        low, high = -1, m + 1
        while high - low > 1:
            k = (low + high) // 2
            low, high = (low, k) if proof(plan, k, m - k).radius > truth else (k, high)
        fewest[m] = high
    return fewest


@pytest.mark.parametrize("plan", PLANS, ids=name)
def test_any_look_of_a_plan_is_false_at_most_as_often_as_alpha(plan: Plan) -> None:
    """Just below a value that the last Clopper-Pearson look can take, too: there a bound is least slack."""
    edges = [clopper_pearson_lower(round(q * plan.n), plan.n, 0.2 * plan.alpha) * (1 - 1e-7) for q in (0.6, 0.9)]
    false = [first_passage(claims_too_much(plan, plan.looks, p), p) for p in AT + edges]
    assert max(false) <= plan.alpha
    assert max(false) >= 0.3 * plan.alpha  # alpha is used, and the check has something to see


def test_of_a_false_class_a_plan_is_as_sure_no_more_often() -> None:
    """The selected class has less than half of the noise: any claim of it is false."""
    plan = Plan(n=400, alpha=0.05, radius=0.1)
    assert first_passage(claims_too_much(plan, plan.looks, 0.5), 0.4999999) <= plan.alpha


def run_exactly(plan: Plan, p: float) -> tuple[float, float]:
    """P(the run stops with a false claim), and the mean number of votes it takes: `decided` itself is asked."""
    truth = one_sided_radius(p, SIGMA)
    alive, at, false, mean = np.ones(1), 0, 0.0, 0.0
    for look in plan.looks:
        alive, at = np.convolve(alive, binom.pmf(np.arange(look - at + 1), look - at, p)), look
        for k in np.flatnonzero(alive > 1e-15).tolist():
            votes = np.array([k, look - k])
            if look == plan.n or decided(plan, votes, 0, sigma=SIGMA, tau=0.0, limit=plan.n):
                false += float(alive[k]) * (prove(plan, votes, 0, sigma=SIGMA, tau=0.0).radius > truth)
                mean += float(alive[k]) * look
                alive[k] = 0.0
    return false, mean


@pytest.mark.parametrize("p", [0.6, 0.9])
@pytest.mark.parametrize(
    "plan", [Plan(n=300, alpha=0.05, radius=0.15), Plan(n=300, alpha=0.05, tolerance=0.1)], ids=name
)
def test_runs_that_stop_are_false_at_most_as_often_as_alpha_and_save_votes(plan: Plan, p: float) -> None:
    false, mean = run_exactly(plan, p)
    assert false <= plan.alpha
    assert mean < plan.n


# --- a client who takes the best of many plans ------------------------------------------------------------------------


def union(p: float, n: int, evidence: float, fixed: float) -> float:
    """P(the mixture at level `evidence` is EVER above p within n votes, or Clopper-Pearson at level `fixed` at n).

    It contains every claim of every plan radius=r, tolerance=t and every cap, deadline and look: all read the same
    votes, the same martingale, and Clopper-Pearson at n alone.
    """
    log_odds = float(np.log(p) - np.log1p(-p))
    need, k, fewest = mixture.threshold(evidence) if evidence else math.inf, 0, {}
    for m in range(1, n + 1):
        while k <= m and mixture.log_evidence(np.array([m - k, k]), VOTE_LEVELS, log_odds, n) < need:
            k += 1
        fewest[m] = k
    if fixed:
        while fewest[n] > 0 and clopper_pearson_lower(fewest[n] - 1, n, fixed) > p:
            fewest[n] -= 1
    return first_passage(fewest, p)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_the_best_of_many_plans_is_false_at_most_as_often_as_alpha(alpha: float) -> None:
    n = 1000
    edges = [clopper_pearson_lower(k, n, (1 - MIXTURE_SHARE) * alpha) * (1 - 1e-9) for k in (540, 850, 960)]
    for p in [0.5, 0.8413447, 0.97724987, *edges]:
        false = union(p, n, MIXTURE_SHARE * alpha, (1 - MIXTURE_SHARE) * alpha)
        assert 0.3 * alpha <= false <= alpha


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_broken_unions_are_caught(alpha: float) -> None:
    """All of alpha for the mixture and all of it again at n: what a fixed plan beside the others would amount to."""
    n = 1000
    p = clopper_pearson_lower(540, n, alpha) * (1 - 1e-9)
    assert union(p, n, alpha, alpha) > 1.05 * alpha
    assert union(p, n, 3 * MIXTURE_SHARE * alpha, 3 * (1 - MIXTURE_SHARE) * alpha) > 1.05 * alpha
    peeked = false_probability(lambda k, m: clopper_pearson_lower(k, m, alpha), list(range(1, 301)), p)
    assert peeked > 3 * alpha


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.45, 0.6, 0.9, 0.99, 1.0]),
    st.one_of(st.floats(0.01, 0.8).map(lambda r: {"radius": r}), st.floats(0.01, 0.5).map(lambda t: {"tolerance": t})),
    st.one_of(st.none(), st.integers(1, 1200)),
)
def test_every_plan_and_cap_claims_what_the_union_covers(
    seed: int, share: float, kind: dict[str, float], cap: int | None
) -> None:
    """The bound depends on the votes so far and on n, not on r, t, the cap, or why the run stopped."""
    winners = (np.random.default_rng(seed).random(1000) < share).astype(np.int64)
    run = Certification(Plan(n=1000, alpha=0.05, **kind), classes=2, sigma=SIGMA, cap=cap)  # type: ignore[arg-type]
    claim = finish(run, winners)
    k = int(winners[: claim.n].sum())
    assert claim.votes == (claim.n - k, k)
    odds = mixture.lower(np.array([claim.n - k, k]), VOTE_LEVELS, 0.8 * 0.05, 1000)
    covered = mixture.probability_below(odds)
    if claim.n == 1000:
        covered = max(covered, clopper_pearson_lower(k, 1000, (1 - 0.8) * 0.05))
    assert claim.p_lower == covered
    assert claim.n <= min(cap or 1000, 1000)


# --- two-sided --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def tables(plan: Plan, m: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """By number of votes, the lower bound of the class that has so many, and the upper one of a runner-up."""
    lower = np.array([proof(plan, k, m - k).p_lower for k in range(m + 1)])
    upper = np.ones(m + 1)
    for k in range(1, m + 1):  # a class without votes, a runner-up with k, and others with at most as many
        upper[k] = proof(plan, 0, *[k] * (m // k), m % k).p_upper
    upper[0] = upper[1]  # no state needs it: somebody has the votes, unless the class itself has them all
    return lower, upper


def two_sided_false(plan: Plan, law: tuple[float, float, float], looks: tuple[int, ...]) -> float:
    """P(any look claims a false radius for class 0 of three), by recursion over the counts of classes 0 and 1."""
    a, b, c = law
    truth = two_sided_radius(a, max(b, c), SIGMA)
    n, false = looks[-1], 0.0
    alive = np.zeros((n + 1, n + 1))
    alive[0, 0] = 1.0
    i, j = np.indices(alive.shape)
    for m in range(1, n + 1):
        moved = c * alive
        moved[1:] += a * alive[:-1]
        moved[:, 1:] += b * alive[:, :-1]
        alive = moved
        if m in looks:
            lower, upper = tables(plan, m)
            inside = i + j <= m
            low = lower[np.minimum(i, m)]
            up = upper[np.where(inside, np.maximum(j, m - i - j), 0)]
            with np.errstate(divide="ignore", invalid="ignore"):
                apart = np.where(low > up, SIGMA / 2 * (ndtri(low) - ndtri(up)), 0.0)
            radius = np.maximum(apart, np.where(low > 0.5, SIGMA * ndtri(low), 0.0))
            # The table's radius is the proof's.
            for x, y in [(m, 0), (m * 2 // 3, m // 6), (m // 2, m // 4), (m // 3, m // 3)]:
                assert proof(plan, x, y, m - x - y).radius == round_down(float(radius[x, y]))
            wrong = inside & (radius > truth + 1e-6)
            false += float(alive[wrong].sum())
            alive[wrong] = 0.0
    return false


LAWS = [(0.55, 0.449, 0.001), (0.6, 0.3, 0.1), (0.45, 0.28, 0.27), (0.34, 0.33, 0.33), (0.9, 0.06, 0.04)]


@pytest.fixture(scope="module")
def two_sided() -> list[float]:
    """False probabilities at the laws, as shares of alpha, every look of the plan."""
    plan = Plan(n=90, alpha=0.05, radius=0.2, bound="two-sided")
    return [two_sided_false(plan, law, plan.looks) / plan.alpha for law in LAWS]


def test_two_sided_plans_are_false_at_most_as_often_as_alpha(two_sided: list[float]) -> None:
    assert max(two_sided) <= 1.0
    assert max(two_sided) > 0.1


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_so_is_the_fixed_two_sided_plan(alpha: float) -> None:
    plan = Plan(n=150, alpha=alpha, bound="two-sided")
    false = [two_sided_false(plan, law, plan.looks) / alpha for law in LAWS]
    assert 0.2 < max(false) <= 1.0


def test_two_sided_bounds_at_three_alpha_are_caught() -> None:
    plan = Plan(n=150, alpha=0.15, bound="two-sided")
    assert max(two_sided_false(plan, law, plan.looks) for law in LAWS) > 0.05


def test_two_sided_certifies_what_one_sided_cannot_and_never_less_by_much() -> None:
    split = (4500, 2000, *[500] * 7)
    assert proof(Plan(n=10_000, bound="two-sided"), *split).class_id == 0
    assert proof(Plan(n=10_000), *split).class_id is None
    both, one = proof(Plan(n=10_000, bound="two-sided"), 9000, 1000), proof(Plan(n=10_000), 9000, 1000)
    assert one.radius - 0.002 <= both.radius <= one.radius


@pytest.mark.parametrize("bound", ["two-sided", "soft"])
def test_the_upper_bound_covers_every_other_class_not_the_one_that_leads(bound: Any) -> None:
    """Soft bounds depend on more than the mean: a rarer class may be the one that is bounded less."""
    plan = Plan(n=1000, alpha=0.05, tolerance=0.1, bound=bound)
    if bound == "two-sided":
        votes = np.array([600, 250, 100, 50])
        alone = [np.array([600, k, 400 - k]) for k in (250,)]
    else:
        votes = np.zeros((4, SOFT_LEVELS), np.int64)
        votes[0, 600] = 1000  # always at .6
        votes[1, 250] = 1000  # always at .25: bounded closely
        votes[2, [0, 1000]] = 770, 230  # sometimes at 1: a smaller mean, bounded loosely
        votes[3, 0] = 1000
        alone = [votes[[0, c]] for c in (1, 2, 3)]
        assert shares(votes)[1] > shares(votes)[2]
    each = [prove(plan, v, 0, sigma=SIGMA, tau=0.0).p_upper for v in alone]
    assert prove(plan, votes, 0, sigma=SIGMA, tau=0.0).p_upper == max(each)


def test_the_order_in_which_classes_are_bounded_does_not_matter() -> None:
    generator = np.random.default_rng(3)
    plan = Plan(n=1000, alpha=0.05, tolerance=0.1, bound="soft")
    for _ in range(10):
        votes = np.zeros((6, SOFT_LEVELS), np.int64)
        for row in votes:
            np.add.at(
                row, (generator.beta(*generator.uniform(0.1, 3, 2), 200) * SOFT_LEVELS).astype(int).clip(max=1023), 1
            )
        mirrored = [
            mixture.upper(row[h], (h + 1) / SOFT_LEVELS, 0.025, 1000) for row in votes if (h := row.nonzero()[0]).size
        ]
        expected = mixture.probability_above(max(mirrored[1:]))
        assert prove(plan, votes, 0, sigma=SIGMA, tau=0.0).p_upper == expected


# --- soft -------------------------------------------------------------------------------------------------------------


def soft_pair(k: int, m: int, high: int, low: int) -> Votes:
    """Two classes; k of m copies give class 0 the level `high`, the others `low`, and class 1 what is left of one."""
    votes = np.zeros((2, SOFT_LEVELS), np.int64)
    for level, times in ((high, k), (low, m - k)):
        votes[0, level] += times
        votes[1, min(SOFT_LEVELS - level, SOFT_LEVELS - 1)] += times
    return votes


@pytest.mark.parametrize(("high", "low", "q"), [(1000, 24, 0.7), (900, 300, 0.6), (1023, 500, 0.9), (1000, 24, 0.98)])
@pytest.mark.parametrize("kind", [{"radius": 0.2}, {"tolerance": 0.1}, {}], ids=["radius", "tolerance", "fixed"])
def test_soft_plans_are_false_at_most_as_often_as_alpha(high: int, low: int, q: float, kind: dict[str, float]) -> None:
    """z = level / 1024 exactly: nothing is lost to rounding for the class, and 1/1024 for the other."""
    plan = Plan(n=1000, alpha=0.05, bound="soft", **kind)  # type: ignore[arg-type]
    mean = (q * high + (1 - q) * low) / SOFT_LEVELS
    truth, fewest = two_sided_radius(mean, 1 - mean, SIGMA), {}
    for m in plan.looks:
        low_k, high_k = -1, m + 1
        while high_k - low_k > 1:
            k = (low_k + high_k) // 2
            over = prove(plan, soft_pair(k, m, high, low), 0, sigma=SIGMA, tau=0.0).radius > truth
            low_k, high_k = (low_k, k) if over else (k, high_k)
        fewest[m] = high_k
    assert first_passage(fewest, q) <= plan.alpha


def test_soft_claims_follow_from_their_levels_alone() -> None:
    """Rounded down for the class, up for the others: what any z inside the levels would prove is no less."""
    plan = Plan(n=1000, alpha=0.05, tolerance=0.1, bound="soft")
    votes = soft_pair(700, 1000, 1000, 24)
    found = prove(plan, votes, 0, sigma=SIGMA, tau=0.0)
    up, down = np.array([25, 1001]) / SOFT_LEVELS, np.array([24, 1000]) / SOFT_LEVELS
    counts = np.array([300, 700])
    assert found.p_lower == mixture.probability_below(mixture.lower(counts, down, 0.025, 1000))
    assert found.p_lower < mixture.probability_below(mixture.lower(counts, up, 0.025, 1000))
    assert found.p_upper >= mixture.probability_above(mixture.upper(counts[::-1], 1 - down[::-1], 0.025, 1000))


@pytest.mark.parametrize("top", [0, 1, 2])
def test_soft_votes_all_at_one_end_prove_what_they_can(top: int) -> None:
    """A class that has everything, selected or not: nothing bounds it from above."""
    votes = np.zeros((3, SOFT_LEVELS), np.int64)
    votes[0, 0] = votes[1, 0] = votes[2, -1] = 64
    found = prove(Plan(n=1000, radius=0.5, bound="soft"), votes, top, sigma=SIGMA, tau=0.0)
    assert (found.class_id, found.p_upper == 1.0, found.radius > 0.2) == (
        (2, False, True) if top == 2 else (None, True, False)
    )


def test_soft_bounds_are_tighter_than_votes_where_the_network_is_unsure() -> None:
    """Every copy says .7: nothing is left to chance, while votes at 70 % leave much."""
    soft = prove(Plan(n=1000, bound="soft"), soft_pair(1000, 1000, 717, 0), 0, sigma=SIGMA, tau=0.0)
    assert proof(Plan(n=1000), 700, 300).radius < soft.radius <= one_sided_radius(0.7003, SIGMA)


# --- tau --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["one-sided", "two-sided", "soft"])
@pytest.mark.parametrize("tau", [1e-18, 1e-13, 1e-3, 0.3, 2.0])
def test_tau_is_taken_off_below_and_added_above(bound: Any, tau: float) -> None:
    plan = Plan(n=1000, alpha=0.05, tolerance=0.1, bound=bound)
    votes = soft_pair(800, 1000, 1000, 24) if bound == "soft" else np.array([800, 150, 50])
    plain, less = (prove(plan, votes, 0, sigma=SIGMA, tau=t) for t in (0.0, tau))
    assert less.p_lower < plain.p_lower
    assert less.p_lower == pytest.approx(max(0.0, plain.p_lower - tau), abs=3e-16)
    assert less.p_upper > plain.p_upper
    assert less.p_upper == pytest.approx(min(1.0, plain.p_upper + tau), abs=3e-16)
    assert less.radius <= plain.radius
    assert (less.class_id is None) == (less.p_lower <= less.p_upper)


# --- PREDICT ----------------------------------------------------------------------------------------------------------


def test_eleven_unanimous_votes_are_the_first_that_can_answer() -> None:
    answers = [n for n in range(1, 30) if proof(Plan(n=n, mode="predict"), 0, n, top=1).class_id == 1]
    assert answers == list(range(11, 30))
    # Were it asked with fewer than its n, it would be a second look.
    assert proof(Plan(n=100, mode="predict"), 0, 99, top=1).class_id is None


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("n", [11, 30, 60])
@pytest.mark.parametrize("law", [(0.5, 0.5, 0.0), (0.34, 0.33, 0.33), (0.4, 0.35, 0.25)])
def test_predict_names_a_wrong_class_at_most_as_often_as_alpha(
    law: tuple[float, float, float], n: int, alpha: float
) -> None:
    """All outcomes of n votes over three classes; class 0 is the right one, if by a hair."""
    plan, false = Plan(n=n, alpha=alpha, mode="predict"), 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            chance = binom.pmf(i, n, law[0]) * binom.pmf(j, n - i, law[1] / (law[1] + law[2]))
            if chance > 1e-15 and max(j, n - i - j) > i:
                false += chance * (proof(plan, i, j, n - i - j).class_id not in (0, None))
    assert false <= alpha
    if n == 60 and law[0] == 0.5:  # (one of two classes: half of the test's alpha)
        assert false > 0.15 * alpha


def test_predict_at_a_larger_level_is_caught() -> None:
    """Three classes alike, at six times the level: wrong too often. (The test itself leaves half of alpha unused.)"""
    n, alpha, false = 60, 0.05, 0.0
    for i in range(n + 1):
        for j in range(n + 1 - i):
            first, second = sorted((i, j, n - i - j))[::-1][:2]
            if max(j, n - i - j) > i and top_two_p_value(first, second) <= 6 * alpha:
                false += binom.pmf(i, n, 1 / 3) * binom.pmf(j, n - i, 1 / 2)
    assert false > alpha


def test_tau_counts_once_an_image_in_predict() -> None:
    plan = Plan(n=11, mode="predict")
    slack = (plan.alpha - 2 * 0.5**11) / 11
    for tau, class_id in ((0.99 * slack, 0), (1.01 * slack, None)):
        assert prove(plan, np.array([11, 0]), 0, sigma=SIGMA, tau=tau).class_id == class_id
