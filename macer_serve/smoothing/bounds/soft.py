"""The soft bound: the smoothed classifier is argmax_c E softmax(beta * logits)_c, and its means are bounded.

The same theorem with means in place of probabilities (Zhai et al. 2020, MACER, soft randomized smoothing).
"""

from __future__ import annotations

import numpy as np

from macer_serve.smoothing.bounds.base import Bound, Proof, both_sides, proof_of
from macer_serve.smoothing.confidence import Budget
from macer_serve.smoothing.radius import two_sided_radius
from macer_serve.smoothing.votes import Votes, count, shares


class Soft(Bound):
    """The mean of class A is bounded from below, the mean of every other class from above."""

    soft = True
    adjective = "soft "

    def alpha_fractions(self, *, fixed: bool) -> dict[str, float]:
        """Returns all of alpha for the mixture: Clopper-Pearson bounds shares of votes only."""
        return {"mixture": 1.0}

    def prove(self, budget: Budget, votes: Votes, top: int, *, sigma: float, tau: float) -> Proof:
        # Means of rounded levels do not add up to one: the bound of A says nothing of the other classes.
        p_lower, p_upper = both_sides(self, budget, votes, top, tau)
        return proof_of(top, two_sided_radius(p_lower, p_upper, sigma), p_lower, p_upper)

    def attainable(self, budget: Budget, votes: Votes, top: int, *, sigma: float, limit: int) -> float:
        most, least = self.limits(budget, votes, top)
        # The votes as they are, but more of them. Their bounds lie as far from the limits as from their means.
        more = np.rint(votes * (limit / count(votes))).astype(np.int64)
        mean, proof = shares(votes), self.prove(budget, more, top, sigma=sigma, tau=0.0)
        second = np.delete(mean, top).max(initial=0.0)
        p_lower = min(proof.p_lower + most - mean[top], 1.0 - 1e-12)
        return two_sided_radius(p_lower, max(proof.p_upper + least - second, 1e-12), sigma)


BOUND = Soft()
