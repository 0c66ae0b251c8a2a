"""The mixture is a supermartingale, and its bounds hold at all numbers of votes at once: exactly, without sampling.

At a fixed p the bound exceeds p where the evidence against "at most p" reaches its threshold, which it does from some
number of successes on: so the probability that it EVER does is a first passage, and a recursion over the successes
gives it to the last digit.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import logit, ndtri

from macer_serve.smoothing import mixture
from macer_serve.smoothing.votes import VOTE_LEVELS, Counts, Levels

VOTES = VOTE_LEVELS


def hard(k: int, n: int) -> Counts:
    return np.array([n - k, k])


def exact_log_evidence(counts: Counts, levels: Levels, log_odds: float, horizon: int) -> mpmath.mpf:
    """The definition, term by term, to 40 digits: stakes, gains and products."""
    with mpmath.workdps(40):
        m = 1 / (1 + mpmath.exp(-mpmath.mpf(log_odds)))
        size = 4 * math.isqrt(horizon) + 4
        total = mpmath.mpf(0)
        for i in range(size):
            u = mpmath.sin((i + mpmath.mpf(1) / 2) * mpmath.pi / (2 * size)) ** 2
            growth = mpmath.mpf(0)
            for count, level in zip(counts.tolist(), levels.tolist(), strict=True):
                growth += count * mpmath.log1p(u * (mpmath.mpf(level) / m - 1))
            total += mpmath.exp(growth)
        return mpmath.log(total / size)


# --- a supermartingale that falls with the mean -----------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 100, 10_000])
@pytest.mark.parametrize("m", [1e-9, 0.01, 0.5, 0.84, 0.999, 1 - 1e-9])
def test_it_starts_at_one_and_is_expected_to_stay(m: float, horizon: int) -> None:
    """Of votes of probability m, from any state: E M after the next vote is M, to rounding."""
    s = float(logit(m))
    assert mixture.log_evidence(hard(0, 0), VOTES, s, horizon) == pytest.approx(0.0, abs=1e-12)
    for k, n in [(0, 0), (1, 1), (0, 3), (5, 9), (60, 70), (99, 99)]:
        now = mixture.log_evidence(hard(k, n), VOTES, s, horizon)
        won = mixture.log_evidence(hard(k + 1, n + 1), VOTES, s, horizon)
        lost = mixture.log_evidence(hard(k, n + 1), VOTES, s, horizon)
        assert m * math.exp(won - now) + (1 - m) * math.exp(lost - now) == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize(
    ("levels", "law"),
    [([0.0, 0.25, 1.0], [0.2, 0.5, 0.3]), ([0.1, 0.5, 0.9], [0.3, 0.3, 0.4]), ([0.0, 1 / 1024, 1.0], [0.1, 0.2, 0.7])],
)
def test_so_it_is_of_observations_of_many_levels(levels: list[float], law: list[float]) -> None:
    """At the mean itself it is a martingale; of a smaller mean it is expected to fall."""
    z, p = np.array(levels), np.array(law)
    mean = float(z @ p)
    state = np.array([3, 4, 5])
    for m, expected in ((mean, 1.0), (min(1.2 * mean, 0.99), None)):
        now = mixture.log_evidence(state, z, float(logit(m)), 1000)
        after = [mixture.log_evidence(state + step, z, float(logit(m)), 1000) for step in np.eye(3, dtype=np.int64)]
        growth = float(p @ np.exp(np.array(after) - now))
        assert growth <= 1.0 + 1e-12
        assert expected is None or growth == pytest.approx(expected, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(-12, 12), st.floats(0.001, 5))
def test_it_falls_with_the_mean_and_rises_with_the_successes(k: int, n: int, s: float, step: float) -> None:
    k %= n + 1
    at = mixture.log_evidence(hard(k, n), VOTES, s, 10**6)
    if k:
        assert mixture.log_evidence(hard(k, n), VOTES, s + step, 10**6) <= at + 1e-9
    if k < n:
        assert mixture.log_evidence(hard(k + 1, n), VOTES, s, 10**6) >= at - 1e-9


# --- the probability that it is ever false ---------------------------------------------------------------------------


@lru_cache(maxsize=64)
def thresholds(p: float, n: int, alphas: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """By alpha and number of votes m = 1..n, the fewest successes whose bound exceeds p (m + 1: none)."""
    s, need = float(logit(p)), [mixture.threshold(alpha) for alpha in alphas]
    fewest = np.empty((len(alphas), n), dtype=np.int64)
    for row, enough in zip(fewest, need, strict=True):
        k = 0
        for m in range(1, n + 1):
            while k <= m and mixture.log_evidence(hard(k, m), VOTES, s, n) < enough:
                k += 1
            row[m - 1] = k
    return fewest


def ever(fewest: npt.NDArray[np.int64], p: float) -> float:
    """P(the successes among the first m votes ever reach fewest[m - 1]), by recursion over every vote."""
    alive, passed = np.zeros(len(fewest) + 2), 0.0
    alive[0] = 1.0
    top = 1  # alive[top:] is zero
    for need in fewest.tolist():
        alive[1 : top + 1] = (1 - p) * alive[1 : top + 1] + p * alive[:top]
        alive[0] *= 1 - p
        top += 1
        if need < top:
            passed += float(alive[need:top].sum())
            alive[need:top] = 0.0
            top = need
    return passed


NEAR_HALF, TARGETS, NEAR_ONE = (0.5, 0.51, 0.6), (0.8413447, 0.97724987), (0.99, 0.999, 0.9999)
ALPHAS = (0.05, 0.001, 0.0008)


@pytest.mark.parametrize("p", [0.02, *NEAR_HALF, 0.75, *TARGETS, *NEAR_ONE])
def test_every_vote_a_look_it_is_false_at_most_as_often_as_alpha(p: float) -> None:
    for alpha, fewest in zip(ALPHAS, thresholds(p, 1000, ALPHAS), strict=True):
        assert ever(fewest, p) <= alpha


@pytest.mark.parametrize("p", [0.5, *TARGETS, 0.98])
def test_up_to_ten_thousand_votes_it_uses_most_of_alpha_and_no_more(p: float) -> None:
    (fewest,) = thresholds(p, 10_000, (0.001,))
    assert 0.5 * 0.001 <= ever(fewest, p) <= 0.001


def test_the_check_notices_a_bound_at_three_times_alpha() -> None:
    (fewest,) = thresholds(0.8413447, 1000, (0.003,))
    assert ever(fewest, 0.8413447) > 0.001


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_the_recursion_counts_every_path(p: float) -> None:
    """Against enumeration of all 2^12 sequences."""
    (fewest,) = thresholds(p, 12, (0.3,))
    total = 0.0
    for bits in itertools.product([0, 1], repeat=12):
        if any(sum(bits[:m]) >= fewest[m - 1] for m in range(1, 13)):
            total += p ** sum(bits) * (1 - p) ** (12 - sum(bits))
    assert total > 0
    assert ever(fewest, p) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.84, 0.99])
@pytest.mark.parametrize("n", [7, 60, 999])
def test_the_bound_exceeds_p_exactly_where_the_evidence_says_so(p: float, n: int) -> None:
    """What the recursions rest on: the root and one evaluation tell the same."""
    (fewest,) = thresholds(p, 1000, (0.05,))
    k = int(fewest[n - 1])
    for successes in range(max(0, k - 2), min(n, k + 2) + 1):
        bound = mixture.lower(hard(successes, n), VOTES, 0.05, 1000)
        assert (bound >= logit(p)) == (successes >= k)


@pytest.mark.parametrize(
    ("levels", "law"),
    [([0.0, 0.5, 1.0], [0.05, 0.2, 0.75]), ([0.0, 0.9, 1.0], [0.3, 0.3, 0.4]), ([0.2, 0.3, 1.0], [0.5, 0.3, 0.2])],
)
def test_soft_bounds_are_false_at_most_as_often_as_alpha(levels: list[float], law: list[float]) -> None:
    """Observations of three levels, every one a look: recursion over both counts, the mean bounded from both sides."""
    n, alpha = 40, 0.05
    z, p = np.array(levels), np.array(law)
    s, need = float(logit(float(z @ p))), mixture.threshold(alpha)
    for side, log_odds in ((z, s), (1.0 - z, -s)):
        alive, passed = np.zeros((n + 2, n + 2)), 0.0  # by how many of the second level, of the third
        alive[0, 0] = 1.0
        for m in range(1, n + 1):
            moved = p[0] * alive
            moved[1:] += p[1] * alive[:-1]
            moved[:, 1:] += p[2] * alive[:, :-1]
            alive = moved
            for i, j in np.argwhere(alive > 0.0).tolist():
                if mixture.log_evidence(np.array([m - i - j, i, j]), side, log_odds, n) >= need:
                    passed += float(alive[i, j])
                    alive[i, j] = 0.0
        assert 0.0 < passed <= alpha


def test_soft_bounds_of_a_continuous_law() -> None:
    """40,000 runs of 100 observations, rounded to 16 levels downwards; false alarm below 1e-6."""
    runs, n, alpha, levels = 40_000, 100, 0.05, 16
    generator = np.random.default_rng(7)
    mean = 0.8  # of Beta(4, 1)
    s = float(logit(mean))
    u = np.sin((np.arange(44) + 0.5) * (math.pi / 2 / 44)) ** 2
    gains = np.log1p(u[:, None] * (np.arange(levels) / levels / mean - 1.0))
    capital, reached = np.zeros((44, runs)), np.zeros(runs, dtype=bool)
    rows = np.zeros((runs, levels), dtype=np.int64)
    for _ in range(n):
        level = (generator.beta(4, 1, runs) * levels).astype(np.int64)
        rows[np.arange(runs), level] += 1
        capital += gains[:, level]
        reached |= np.exp(capital).mean(0) >= 1 / alpha
    # The simulation's capital is the package's.
    for row, growth in zip(rows[:20], capital[:, :20].T, strict=True):
        ours = mixture.log_evidence(row, np.arange(levels) / levels, s, n)
        assert ours == pytest.approx(math.log(np.exp(growth).mean()), abs=1e-9)
    assert reached.mean() <= alpha + 4.9 * math.sqrt(alpha / runs)


# --- floating point ---------------------------------------------------------------------------------------------------


def test_no_evidence_is_no_evidence() -> None:
    """5e4 of 1e5 votes say nothing for a probability above .84: an underflow, clamped, would make that evidence."""
    log_odds = float(logit(0.84))
    assert mixture.log_evidence(hard(50_000, 100_000), VOTES, log_odds, 100_000) < -5.0
    exact = exact_log_evidence(hard(50_000, 100_000), VOTES, log_odds, 100_000)
    assert float(exact) == pytest.approx(mixture.log_evidence(hard(50_000, 100_000), VOTES, log_odds, 100_000))
    assert mixture.lower(hard(50_000, 100_000), VOTES, 0.001, 100_000) < 0.0
    assert mixture.log_evidence(hard(0, 10**7), VOTES, 15.0, 10**7) < -5.0


@st.composite
def counted(draw: st.DrawFn) -> tuple[int, int, int]:
    horizon = draw(st.sampled_from([1, 30, 1000, 100_000, 10**7]))
    n = draw(st.one_of(st.just(horizon), st.integers(1, horizon)))
    k = draw(st.one_of(st.integers(0, n), st.integers(0, min(n, 20)), st.integers(0, min(n, 20)).map(lambda j: n - j)))
    return k, n, horizon


@settings(max_examples=200, deadline=None)
@given(counted(), st.one_of(st.sampled_from([0.001, 0.05, 0.0002]), st.floats(1e-12, 0.49)))
@example((0, 10**7, 10**7), 0.001)
@example((1, 10**7, 10**7), 1e-12)
@example((10**7, 10**7, 10**7), 0.001)
@example((10**7 - 1, 10**7, 10**7), 1e-12)
@example((1, 1, 1), 0.49)
@example((1, 1, 10**7), 0.001)
def test_bounds_lie_between_nothing_and_the_share_and_mirror_each_other(
    votes: tuple[int, int, int], alpha: float
) -> None:
    k, n, horizon = votes
    low, high = (f(hard(k, n), VOTES, alpha, horizon) for f in (mixture.lower, mixture.upper))
    assert high == -mixture.lower(hard(n - k, n), VOTES, alpha, horizon)
    below, above = mixture.probability_below(low), mixture.probability_above(high)
    assert 0.0 <= below <= k / n <= above <= 1.0
    assert below < 1.0
    assert above > 0.0
    assert (low == -math.inf) == (below == 0.0) == (k == 0)
    assert (high == math.inf) == (k == n)
    if k:  # the evidence is there, and no millionth of the odds is given away
        need = mixture.threshold(alpha)
        assert mixture.log_evidence(hard(k, n), VOTES, low, horizon) >= need
        assert mixture.log_evidence(hard(k, n), VOTES, low + 1e-6, horizon) < need + 1e-9


@pytest.mark.parametrize(
    ("k", "n", "horizon"),
    [
        (1, 1, 1), (1, 1000, 1000), (999, 1000, 1000), (1000, 1000, 1000), (841, 1000, 100_000),
        (50_500, 100_000, 100_000), (97_725, 100_000, 100_000), (100_000, 100_000, 100_000),
        (5_003_000, 10**7, 10**7), (10**7 - 3, 10**7, 10**7), (10**7, 10**7, 10**7), (2, 10**7, 10**7),
    ],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [0.05, 0.0008])
def test_the_evidence_for_a_bound_is_really_there(k: int, n: int, horizon: int, alpha: float) -> None:
    """In 40 digits, at the probability as it is finally stated: at least log 1 / alpha, the safe side."""
    p = mixture.probability_below(mixture.lower(hard(k, n), VOTES, alpha, horizon))
    with mpmath.workdps(40):
        exact = exact_log_evidence(hard(k, n), VOTES, mpmath.log(mpmath.mpf(p) / (1 - mpmath.mpf(p))), horizon)
        assert exact >= -mpmath.log(alpha)
        assert exact <= -mpmath.log(alpha) + mpmath.mpf("3e-6")


def test_so_it_is_for_soft_votes() -> None:
    """Levels next to each other and at both ends, a million votes."""
    levels = np.array([0, 1, 511, 512, 1022, 1023]) / 1024
    for counts in ([0, 0, 3, 5, 20, 972], [10, 20, 30, 40, 50, 850], [1, 0, 0, 0, 0, 10**6], [10**6, 1, 0, 0, 0, 5]):
        c = np.array(counts)
        p = mixture.probability_below(mixture.lower(c, levels, 0.0005, 10**6))
        with mpmath.workdps(40):
            exact = exact_log_evidence(c, levels, mpmath.log(mpmath.mpf(p) / (1 - mpmath.mpf(p))), 10**6)
            assert exact >= -mpmath.log(0.0005)


@pytest.mark.parametrize("s", [-745.0, -60.0, -1.0, 0.0, 1.0, 17.0, 40.0, 745.0])
def test_probabilities_are_rounded_outwards(s: float) -> None:
    with mpmath.workdps(60):
        exact = 1 / (1 + mpmath.exp(-mpmath.mpf(s)))
        assert mixture.probability_below(s) <= exact <= mixture.probability_above(s)
        assert mixture.probability_above(s) - mixture.probability_below(s) <= 2e-15 * max(float(exact), 1e-300)


def test_nothing_proved_is_zero_or_one() -> None:
    assert mixture.probability_below(-math.inf) == 0.0
    assert mixture.probability_above(math.inf) == 1.0
    assert mixture.lower(hard(0, 0), VOTES, 0.05, 100) == -math.inf
    assert mixture.upper(hard(0, 0), VOTES, 0.05, 100) == math.inf


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 3000), st.sampled_from([0.05, 0.001]))
def test_soft_votes_of_the_levels_0_and_1_are_votes(k: int, n: int, alpha: float) -> None:
    """However the levels that do not occur are listed."""
    k %= n + 1
    levels = np.arange(5) / 4
    counts = np.array([n - k, 0, 0, 0, k])
    for f in (mixture.lower, mixture.upper):
        assert f(counts, levels, alpha, 3000) == pytest.approx(f(hard(k, n), VOTES, alpha, 3000), abs=1e-9)


def test_it_lies_between_the_uniform_prior_and_clopper_pearson() -> None:
    """Unanimous votes at alpha = 0.001, sigma = 0.25, a plan of 100,000: published radii of both, to four decimals."""
    for n, uniform, fixed in [(1000, 0.5907, 0.6158), (10_000, 0.7794, 0.7996), (100_000, 0.9356, 0.9529)]:
        p = mixture.probability_below(mixture.lower(hard(n, n), VOTES, 0.001, 100_000))
        assert uniform < 0.25 * float(ndtri(p)) < fixed


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 1000), st.sampled_from([0.05, 0.001]))
def test_the_horizon_hardly_matters(k: int, n: int, alpha: float) -> None:
    """Every grid is a Gauss-Chebyshev rule for one prior, the arcsine law: plans of other n bet alike.

    So whoever runs plans of several n on the same votes gains nothing by it.
    """
    k %= n + 1
    early, late = (mixture.lower(hard(k, n), VOTES, alpha, horizon) for horizon in (1000, 10**6))
    assert early == late or early == pytest.approx(late, abs=1e-9)
