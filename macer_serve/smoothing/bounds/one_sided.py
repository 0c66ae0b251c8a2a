"""The one-sided bound: p_B = 1 - p_A (Cohen et al. 2019, CERTIFY)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.special import ndtr

from macer_serve.smoothing import mixture
from macer_serve.smoothing.bounds.base import FUTILITY, Bound, Proof, less_tau, most_of, proof_of
from macer_serve.smoothing.confidence import Budget
from macer_serve.smoothing.radius import one_sided_radius
from macer_serve.smoothing.votes import Votes, levels_of


class OneSided(Bound):
    """p_A is bounded from below, and every other class by 1 - p_A."""

    sides = 1

    def prove(self, budget: Budget, votes: Votes, top: int, *, sigma: float, tau: float) -> Proof:
        p_lower = less_tau(budget.lower(votes, top, sides=self.sides), tau)
        return proof_of(top, one_sided_radius(p_lower, sigma), p_lower, 1.0 - p_lower)

    def attainable(self, budget: Budget, votes: Votes, top: int, *, sigma: float, limit: int) -> float:
        k = min(limit, math.ceil(most_of(budget, votes, top) * limit))
        return self.prove(budget, np.array([k, limit - k]), 0, sigma=sigma, tau=0.0).radius

    def radius_decision(
        self, budget: Budget, votes: Votes, top: int, radius: float, *, sigma: float, tau: float
    ) -> Literal["radius", "futility"] | None:
        """Returns what the base class does, by one evaluation of the martingale in place of its root."""
        counts, levels = levels_of(votes, top, up=False)
        target = float(ndtr((radius + 2e-6) / sigma)) + tau  # 2e-6: the radius that is shown is rounded down
        if target >= 1.0:
            return "futility"
        log_odds = math.log(target) - math.log1p(-target)
        spend = budget.split["mixture"]
        if mixture.log_evidence(counts, levels, log_odds, budget.n) >= mixture.threshold(spend):
            return "radius"
        against = mixture.log_evidence(*mixture.mirrored(counts, levels), -log_odds, budget.n)
        return None if against < mixture.threshold(FUTILITY) else "futility"

    def shortfall(self, p_upper: float) -> str:
        return ", and a certificate needs more than 50 %"


BOUND = OneSided()
