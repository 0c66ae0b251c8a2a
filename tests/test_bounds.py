"""Bounds hold at their level, exactly; radii never round up. No network, no sampling: every test is deterministic."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
from first_passage import Bound, false_probability
from hypothesis import example, given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from macer_serve.errors import ParameterError
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.radius import one_sided_radius, round_down, two_sided_radius


def tail(k: int, n: int, p: float) -> mpmath.mpf:
    """P(Bin(n, p) >= k) for k above the mean, to 40 digits: the largest term times a decreasing series."""
    with mpmath.workdps(40):
        exact, q = mpmath.mpf(p), 1 - mpmath.mpf(p)
        log_first = (
            mpmath.loggamma(n + 1) - mpmath.loggamma(k + 1) - mpmath.loggamma(n - k + 1)
            + k * mpmath.log(exact) + (n - k) * mpmath.log(q)
        )  # fmt: skip
        # Fixed point of 160 bits; what is cut off makes the sum smaller by less than 1e-30 of itself.
        odds = int(mpmath.floor(exact / q * mpmath.mpf(2) ** 160))
        term = total = 1 << 160
        i = k
        while term > 1 and i < n:
            term = term * (n - i) * odds // ((i + 1) << 160)
            total += term
            i += 1
        return mpmath.exp(log_first) * total / mpmath.mpf(2) ** 160


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.one_of(st.integers(1, 50), st.integers(1, 10**4), st.integers(1, 10**7)))
    k = draw(st.one_of(st.integers(0, n), st.integers(0, min(n, 20)).map(lambda j: n - j), st.just(n)))
    return k, n


ALPHAS = st.one_of(st.sampled_from([0.001, 0.05, 0.0002]), st.floats(1e-12, 0.49))


@settings(max_examples=150, deadline=None)
@given(counts(), ALPHAS)
@example((0, 10), 0.001)
@example((10, 10), 0.001)
@example((10**7, 10**7), 0.001)
@example((10**7 - 1, 10**7), 1e-12)
@example((5 * 10**6, 10**7), 0.001)
@example((5 * 10**6, 10**7), 1e-6)
@example((1, 10**7), 0.05)
@example((1, 1), 0.49)
def test_clopper_pearson_never_exceeds_the_exact_bound(votes: tuple[int, int], alpha: float) -> None:
    (k, n), p = votes, clopper_pearson_lower(*votes, alpha)
    assert 0.0 <= p < 1.0
    if k == 0:
        assert p == 0.0
    else:
        assert p > 0.0
        assert tail(k, n, p) <= mpmath.mpf(alpha)
        # Nor is anything given away: one part in a million of the distance to either end is too much already.
        above = p + max(1e-6 * min(p, 1 - p), 4e-15)
        assert tail(k, n, above) > mpmath.mpf(alpha)


@settings(max_examples=300, deadline=None)
@given(counts(), ALPHAS)
def test_clopper_pearson_is_the_one_of_statsmodels(votes: tuple[int, int], alpha: float) -> None:
    theirs = float(proportion_confint(*votes, alpha=2 * alpha, method="beta")[0])
    ours = clopper_pearson_lower(*votes, alpha)
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_the_literatures_figure() -> None:
    """Unanimous votes, sigma = 0.25, alpha = 0.001; the last one is printed as 0.953 in published logs: rounded up."""
    radii = [round_down(one_sided_radius(clopper_pearson_lower(n, n, 0.001), 0.25)) for n in (100, 1000, 10**4, 10**5)]
    assert radii == pytest.approx([0.3751, 0.6158, 0.7996, 0.9529], abs=6e-5)
    assert radii[-1] < 0.953


@pytest.mark.parametrize(
    ("k", "n", "alpha"),
    [(-1, 10, 0.05), (11, 10, 0.05), (0, 0, 0.05), (5, 10, 0.0), (5, 10, 0.5), (5, 10, -1.0), (5, 10, math.nan)],
)
def test_what_is_no_count_or_level_is_refused(k: int, n: int, alpha: float) -> None:
    with pytest.raises(ParameterError):
        clopper_pearson_lower(k, n, alpha)


# --- the false probability, without a network -----------------------------------------------------------------------


def probabilities(n: int, alpha: float) -> list[float]:
    """Many p: near 1/2, near 1, near usual targets, and, where a bound is least slack, just below a bound's value."""
    grid = [0.5, 0.500001, 0.51, 0.6, 0.75, 0.8413447, 0.9, 0.97724987, 0.99, 0.999, 0.9999]
    ks = sorted({n, n - 1, n - 2, *(round(n * q) for q in (0.4, 0.52, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99))})
    return grid + [clopper_pearson_lower(k, n, alpha) * (1 - 1e-9) for k in ks]


def assert_sound(bound: Bound, looks: list[int], alpha: float) -> None:
    """The one test that every bound must pass, and that broken ones must fail."""
    worst, at = max((false_probability(bound, looks, p), p) for p in probabilities(looks[-1], alpha))
    assert worst <= alpha * (1 + 1e-9), (
        f"false with probability {worst:.6f} at p = {at:.6f}: {worst / alpha:.2f} times alpha = {alpha:g}"
    )


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_clopper_pearson_is_false_at_most_as_often_as_alpha(n: int, alpha: float) -> None:
    assert_sound(lambda k, m: clopper_pearson_lower(k, m, alpha), [n], alpha)


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_and_it_uses_alpha_up(n: int, alpha: float) -> None:
    """The check above has power: just below a bound's value the false probability is alpha itself."""
    p = clopper_pearson_lower(int(0.8 * n), n, alpha) * (1 - 1e-9)
    assert false_probability(lambda k, m: clopper_pearson_lower(k, m, alpha), [n], p) == pytest.approx(alpha, rel=1e-4)


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_a_bound_at_three_times_alpha_is_caught(n: int, alpha: float) -> None:
    with pytest.raises(AssertionError, match=r"times alpha"):
        assert_sound(lambda k, m: clopper_pearson_lower(k, m, 3 * alpha), [n], alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_clopper_pearson_peeked_at_after_every_draw_is_caught(alpha: float) -> None:
    """The very bound that is sound at one look is not sound at the best of many."""

    def bound(k: int, m: int) -> float:
        return clopper_pearson_lower(k, m, alpha)

    with pytest.raises(AssertionError, match=r"times alpha"):
        assert_sound(bound, list(range(1, 201)), alpha)
    with pytest.raises(AssertionError, match=r"times alpha"):
        assert_sound(bound, list(range(100, 1001, 100)), alpha)


def test_first_passage_counts_every_path() -> None:
    """Against enumeration of all 2^12 sequences."""
    looks, p = [3, 5, 8, 12], 0.6

    def bound(k: int, m: int) -> float:
        return clopper_pearson_lower(k, m, 0.3)

    total = 0.0
    for path in range(1 << 12):
        bits = [(path >> i) & 1 for i in range(12)]
        if any(bound(sum(bits[:m]), m) > p for m in looks):
            total += p ** sum(bits) * (1 - p) ** (12 - sum(bits))
    assert false_probability(bound, looks, p) == pytest.approx(total, rel=1e-12)


# --- radii ----------------------------------------------------------------------------------------------------------


@settings(max_examples=1000)
@given(st.one_of(st.floats(0.0, 30.0), st.integers(0, 5 * 10**6).map(lambda i: i / 1e6)))
@example(0.0)
@example(1e-9)
@example(1e-6)
@example(0.953)
@example(0.9528999999)
@example(math.nextafter(0.953, 1.0))
def test_a_radius_is_never_rounded_up(radius: float) -> None:
    shown = round_down(radius)
    assert 0.0 <= shown <= radius
    if radius > 0:
        assert Fraction(radius) - Fraction(shown) <= Fraction(1_001_001, 10**12)
    assert shown == round(shown, 6)  # six decimals say it whole
    assert shown == 0.0 or Fraction(f"{shown:.6f}") < Fraction(radius)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.floats(0.5, 1.0, exclude_max=True), st.floats(-16, -1).map(lambda e: 1 - 10**e)), st.floats(0.005, 4)
)
def test_a_shown_radius_is_below_the_exact_one(p_lower: float, sigma: float) -> None:
    with mpmath.workdps(40):
        exact = mpmath.mpf(sigma) * mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p_lower) - 1)
        radius = one_sided_radius(p_lower, sigma)
        assert abs(radius - exact) <= mpmath.mpf("1e-13") * max(1, exact)
        assert round_down(radius) <= exact


@pytest.mark.parametrize("p_lower", [0.0, 0.3, 0.5, math.nextafter(0.5, 0.0)])
def test_no_radius_below_one_half(p_lower: float) -> None:
    assert one_sided_radius(p_lower, 0.25) == 0.0


@pytest.mark.parametrize(("p_lower", "p_upper"), [(0.9, 0.0), (1.0, 0.0), (1.0, 0.5), (0.9, 5e-324)])
def test_bounds_of_exactly_0_and_1_give_finite_radii_below_the_exact_one(p_lower: float, p_upper: float) -> None:
    """A network of one class has p_upper = 0: the exact radius is infinite."""
    assert 0.0 < round_down(two_sided_radius(p_lower, p_upper, 0.25)) < 10.0
    assert 0.0 < round_down(one_sided_radius(p_lower, 0.25)) < 3.0
