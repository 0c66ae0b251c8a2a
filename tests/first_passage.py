"""The probability that a bound is false at any of its looks, by recursion over all paths of votes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import binom

Bound = Callable[[int, int], float]


def boundary(bound: Bound, looks: list[int], p: float) -> dict[int, int]:
    """By look m, the fewest successes whose bound exceeds p (m + 1: none). Bounds rise with k and fall with m."""
    fewest, k = {}, 0
    for m in looks:
        while k <= m and bound(k, m) <= p:
            k += 1
        fewest[m] = k
    return fewest


def false_probability(bound: Bound, looks: list[int], p: float) -> float:
    """P(the bound exceeds p at any of the looks), by exact first passage over all paths of successes."""
    fewest = boundary(bound, looks, p)
    alive, passed, before = np.ones(1), 0.0, 0
    for m in looks:
        # Independent successes between two looks: convolve with their binomial law.
        alive = np.convolve(alive, binom.pmf(np.arange(m - before + 1), m - before, p))
        passed += float(alive[fewest[m] :].sum())
        alive[fewest[m] :] = 0.0
        before = m
    return passed
