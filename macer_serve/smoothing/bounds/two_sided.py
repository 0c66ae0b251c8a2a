"""The two-sided bound: p_A from below, every other class from above, each at half of alpha.

No share of alpha per class is needed. With c* the true runner-up, fixed if unknown, the radius is at most the one
against c*, so that only p_A and p_c* must be bounded together.
"""

from __future__ import annotations

import math

import numpy as np

from macer_serve.smoothing.bounds.base import Bound, Proof, both_sides, proof_of
from macer_serve.smoothing.confidence import Budget
from macer_serve.smoothing.radius import one_sided_radius, two_sided_radius
from macer_serve.smoothing.votes import Votes


class TwoSided(Bound):
    """p_A is bounded from below, every other class from above."""

    def prove(self, budget: Budget, votes: Votes, top: int, *, sigma: float, tau: float) -> Proof:
        p_lower, others = both_sides(self, budget, votes, top, tau)
        # Probabilities add up to one: the bound of p_A bounds the other classes, too.
        p_upper = min(1.0 - p_lower, others)
        radius = max(one_sided_radius(p_lower, sigma), two_sided_radius(p_lower, others, sigma))
        return proof_of(top, radius, p_lower, p_upper)

    def attainable(self, budget: Budget, votes: Votes, top: int, *, sigma: float, limit: int) -> float:
        most, least = self.limits(budget, votes, top)
        k = min(limit, math.ceil(most * limit))
        rest = limit - k
        # The other classes share the rest. No class exceeds the runner-up, and all of the rest goes to some class.
        runner_up = min(rest, max(math.floor(least * limit), -(-rest // max(1, len(votes) - 1))))
        hoped = np.array([k, *[runner_up] * (rest // max(1, runner_up)), rest % max(1, runner_up)])
        return self.prove(budget, hoped, 0, sigma=sigma, tau=0.0).radius


BOUND = TwoSided()
