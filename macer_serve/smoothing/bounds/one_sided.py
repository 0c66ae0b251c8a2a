"""The one-sided bound: p_B = 1 - p_A (Cohen et al. 2019, CERTIFY)."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from macer_serve.smoothing import mixture
from macer_serve.smoothing.bounds.base import FUTILITY, Bound, Proof, less_tau, most_of, proof_of
from macer_serve.smoothing.confidence import Budget
from macer_serve.smoothing.radius import one_sided_radius
from macer_serve.smoothing.votes import Votes, count, levels_of


class OneSided(Bound):
    """p_A is bounded from below, and every other class by 1 - p_A."""

    sides = 1

    def prove(self, budget: Budget, votes: Votes, top: int, *, sigma: float, tau: float) -> Proof:
        p_lower = less_tau(budget.lower(votes, top, sides=self.sides), tau)
        return proof_of(top, one_sided_radius(p_lower, sigma), p_lower, 1.0 - p_lower)

    def attainable(self, budget: Budget, votes: Votes, top: int, *, sigma: float, limit: int) -> float:
        k = min(limit, math.ceil(most_of(budget, votes, top) * limit))
        return self.prove(budget, np.array([k, limit - k]), 0, sigma=sigma, tau=0.0).radius

    def may_exceed(self, budget: Budget, votes: Votes, top: int, radius: float, *, sigma: float, tau: float) -> bool:
        """Returns the same as `Bound.may_exceed` allows, by one evaluation of the martingale instead of its root."""
        if count(votes) == budget.n or "mixture" not in budget.split:  # Clopper-Pearson may prove more
            return True
        target = float(ndtr(radius / sigma)) + tau
        if target >= 1.0:
            return False
        log_odds = math.log(target) - math.log1p(-target)
        evidence = mixture.log_evidence(*levels_of(votes, top, up=False), log_odds, budget.n)
        return evidence >= mixture.threshold(budget.split["mixture"])

    def hopeless(self, budget: Budget, votes: Votes, top: int, radius: float, *, sigma: float) -> bool:
        """Returns the same as `Bound.hopeless`, by one evaluation of the martingale instead of its root."""
        target = float(ndtr(radius / sigma))
        if target >= 1.0:
            return True
        log_odds = math.log(target) - math.log1p(-target)
        against = mixture.log_evidence(*mixture.mirrored(*levels_of(votes, top, up=False)), -log_odds, budget.n)
        return against >= mixture.threshold(FUTILITY)

    def shortfall(self, p_upper: float, what: str = "class") -> str:
        return ", and a certificate needs more than 50 %"


BOUND = OneSided()
