"""Anytime-valid bounds on a mean: a betting martingale, mixed over fixed stakes.

For independent observations z in [0, 1] and the hypothesis that their mean is at most m, a gambler who stakes
the share u of his capital multiplies it by 1 + u (z / m - 1), whose expectation is at most 1. Averaged over stakes
fixed beforehand,

    M_n(m) = mean over u of  prod over observations of (1 + u (z / m - 1))

is a non-negative supermartingale from 1, so P(exists n: M_n(m) >= 1 / alpha) <= alpha (Ville 1939), and it decreases
in m: the m at which it equals 1 / alpha is a lower confidence bound of the mean, valid at all n at once. For hard
votes, z in {0, 1}, this is the mixture of binomial likelihood ratios over p = m + (1 - m) u (Robbins 1970); for soft
ones, the capital process of Waudby-Smith & Ramdas 2024. The stakes are an arcsine grid: a finite mixture
is exact as it stands, no quadrature error enters the guarantee.

Observations are given as `counts` of `levels`: int64 `[levels]` beside float64 `[levels]`. A vote is two levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.special import expit

from macer_serve.smoothing.votes import Counts, Levels

# The name of the stakes in policies. Other stakes need another name, because whoever could choose among stakes after
# seeing the votes would have several chances.
STAKES = "arcsine-grid/1"
# A bound below these log-odds counts as 0. Ten million votes reach -25.
_FURTHEST = 60.0
# Added to the threshold. The floating-point error of log M stays below 1e-9 for ten million votes.
_MARGIN = 1e-6
# How often a root evaluates the martingale, about.
_EVALUATIONS = 55


@lru_cache(maxsize=64)
def _stakes(n: int) -> tuple[Levels, Levels]:
    """Returns the arcsine grid of stakes u for runs of at most n observations, and log(1 - u).

    In the angle phi, u = sin^2(phi), the likelihood of n votes has width 1 / (2 sqrt(n)). The grid must be as fine.
    """
    size = 4 * math.isqrt(n) + 4
    phi = (np.arange(size) + 0.5) * (math.pi / 2 / size)
    return np.sin(phi) ** 2, 2.0 * np.log(np.cos(phi))


def work(levels: list[int], horizon: int) -> int:
    """Returns about how many stakes are evaluated for bounds of classes with so many levels, two of them by roots."""
    largest = sum(sorted(levels)[-2:])
    return (_EVALUATIONS * largest + 2 * sum(levels)) * len(_stakes(horizon)[0])


def log_evidence(counts: Counts, levels: Levels, log_odds: float, horizon: int) -> float:
    """Returns log M against the hypothesis that the mean is at most expit(log_odds).

    `horizon` is the largest number of observations that the run may take. It is fixed beforehand and sets the stakes.
    The hypothesis is given as log-odds, so that digits are lost neither near 0 nor near 1.
    """
    return _evidence(counts, levels, log_odds, horizon, slope=False)[0]


def _evidence(counts: Counts, levels: Levels, log_odds: float, horizon: int, *, slope: bool) -> tuple[float, float]:
    """Returns log M and, if asked for, its derivative by log_odds."""
    m, q = float(expit(log_odds)), float(expit(-log_odds))
    stakes, log_rest = _stakes(horizon)
    total, falls = np.zeros_like(stakes), np.zeros_like(stakes)
    for count, level in zip(counts.tolist(), levels.tolist(), strict=True):
        if level == 0.0:
            total += count * log_rest
        elif count:
            # z / m - 1, computed from z and m or from 1 - z and 1 - m, whichever keeps its digits
            gain = (level - m) / m if m < 0.5 else (q - (1.0 - level)) / m
            total += count * np.log1p(stakes * gain)
            if slope:
                falls += count * (level * q / m) * stakes / (1.0 + stakes * gain)
    highest = float(total.max())
    weights = np.exp(total - highest)
    mass = float(weights.sum())
    return highest + math.log(mass / len(weights)), -float(weights @ falls) / mass if slope else 0.0


def threshold(alpha: float) -> float:
    """Returns the log M at which a hypothesis is rejected at level alpha, floating-point error included."""
    return -math.log(alpha) + _MARGIN


def lower(counts: Counts, levels: Levels, alpha: float, horizon: int) -> float:
    """Returns the lower bound of the mean at level alpha, as log-odds, valid at all numbers of observations at once.

    Returns `-inf` if nothing is proved.
    """
    n = int(counts.sum())
    mean = float(counts @ levels) / n if n else 0.0
    if mean <= 0.0:
        return -math.inf
    need = threshold(alpha)
    evidence: Callable[[float], float] = lambda s: log_evidence(counts, levels, s, horizon)  # noqa: E731
    # At the mean itself there is no evidence. The search moves below the mean until there is.
    high = math.log(mean) - math.log1p(-mean) if mean < 1.0 else math.log(2.0 * n)
    gap = 2.0 * math.sqrt(need / (n * max(mean * (1.0 - mean), 1.0 / n)))
    low = high - gap
    while evidence(low) < need:
        if low < -_FURTHEST:
            return -math.inf
        low, high, gap = low - 2.0 * gap, low, 2.0 * gap
    while mean == 1.0 and evidence(high) >= need:  # the mean of unanimous votes has no log-odds
        low, high = high, high + 1.0
    s = _root(lambda s: _evidence(counts, levels, s, horizon, slope=True), need, low, high)
    step = 1e-12
    while evidence(s) < need:  # take the side of the root that has the evidence
        s -= step
        step *= 2.0
    return s


def _root(evidence: Callable[[float], tuple[float, float]], need: float, low: float, high: float) -> float:
    """Returns the s in [low, high] at which the evidence falls to `need`, to 1e-12.

    The evidence is nearly a square of the distance from the mean. Newton's steps are taken for its square root, and
    kept in the bracket.
    """
    s = 0.5 * (low + high)
    for _ in range(_EVALUATIONS):
        value, slope = evidence(s)
        if value >= need:
            low = s
        else:
            high = s
        guess = low
        if slope < 0.0 < value:
            guess = s - 2.0 * math.sqrt(value) * (math.sqrt(value) - math.sqrt(need)) / slope
        if abs(guess - s) <= 1e-12 * max(1.0, abs(s)) or high - low <= 1e-12:
            return guess if low <= guess <= high else low
        s = guess if low < guess < high else 0.5 * (low + high)
    return low


def mirrored(counts: Counts, levels: Levels) -> tuple[Counts, Levels]:
    """Returns the observations 1 - z. Evidence that the mean of z is low is evidence that their mean is high."""
    return counts[::-1], 1.0 - levels[::-1]


def upper(counts: Counts, levels: Levels, alpha: float, horizon: int) -> float:
    """Returns the upper bound of the mean, as log-odds; `inf` if nothing is proved."""
    return -lower(*mirrored(counts, levels), alpha, horizon)


def probability_below(log_odds: float) -> float:
    """Returns expit(log_odds), rounded towards 0."""
    return max(0.0, math.nextafter(float(expit(log_odds)) * (1.0 - 4e-16), 0.0))


def probability_above(log_odds: float) -> float:
    """Returns expit(log_odds), rounded towards 1."""
    return min(1.0, math.nextafter(float(expit(log_odds)) * (1.0 + 4e-16), 1.0))
