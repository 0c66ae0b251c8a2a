"""Exact binomial bounds and tests.

All bounds err on the safe side in floating point. What is returned never claims more than the exact bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.special import betainc, betaincinv
from scipy.stats import binom

from macer_serve.errors import ParameterError


def check_alpha(alpha: float) -> None:
    """Raise `ParameterError` unless 0 < alpha < 0.5."""
    if not isinstance(alpha, float | int) or not 0.0 < alpha < 0.5:
        raise ParameterError(f"alpha must lie strictly between 0 and 0.5, not {alpha}")


def clopper_pearson_lower(k: int, n: int, alpha: float) -> float:
    """Returns the exact one-sided lower bound of p after k successes in n trials, at level alpha.

    P(bound > p) <= alpha for every p (Clopper & Pearson 1934); for trials of unequal probability it
    bounds their mean (Hoeffding 1956). Raises `ParameterError` unless 0 <= k <= n, n >= 1, 0 < alpha < 0.5.
    """
    check_alpha(alpha)
    if not 0 <= k <= n or n < 1:
        raise ParameterError(f"votes must satisfy 0 <= k <= n and n >= 1, not k = {k}, n = {n}")
    if k == 0:
        return 0.0
    if k == n:
        # Solves p^n = alpha; one step down absorbs the rounding of pow.
        return math.nextafter(alpha ** (1.0 / n), 0.0) * (1.0 - 1e-15)
    p = float(betaincinv(k, n - k + 1, alpha))
    # P(Bin(n, p) >= k) = I_p(k, n - k + 1) must not exceed alpha. The inverse's error is stepped down. `betainc` itself
    # is off by a few 1e-12 for ten million trials.
    step = 1e-15
    while p > 0.0 and float(betainc(k, n - k + 1, p)) > alpha * (1.0 - 1e-11):
        p -= step * min(p, 1.0 - p)
        step *= 2.0
    return max(0.0, p)


def clopper_pearson_upper(k: int, n: int, alpha: float) -> float:
    """Returns the exact one-sided upper bound, the mirror image of the lower one, rounded towards 1."""
    return min(1.0, math.nextafter(1.0 - clopper_pearson_lower(n - k, n, alpha), 2.0))


def empirical_bernstein_lower(mean: float, variance: float, n: int, alpha: float) -> float:
    """Returns the lower bound of a mean of n observations in [0, 1] by Maurer & Pontil 2009, Theorem 4.

    `variance` is the unbiased sample variance. For comparison: the betting bound of `mixture` is tighter.
    """
    check_alpha(alpha)
    spend = math.log(2.0 / alpha)
    return max(0.0, mean - math.sqrt(2.0 * variance * spend / n) - 7.0 * spend / (3.0 * (n - 1)))


def top_two_p_value(first: int, second: int) -> float:
    """Returns the p-value of the two-sided binomial test that two classes are equally likely.

    Cohen et al. 2019, PREDICT.
    """
    if first <= second:
        return 1.0
    return min(1.0, 2.0 * float(binom.sf(first - 1, first + second, 0.5)) * (1.0 + 1e-12))


def smallest(holds: Callable[[int], bool], *, most: int = 2**24) -> int:
    """Returns the smallest n >= 1 for which `holds(n)`, or `most` if it does not hold below that.

    `holds` must be true for all n from some n on, and false for all n before.
    """
    high = 1
    while high < most and not holds(high):
        high = min(2 * high, most)
    low = high // 2  # it does not hold for 1 to low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
