"""A bound of its own file, as a reader would add one: the one-sided bound at half the radius."""

from __future__ import annotations

from dataclasses import replace

from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.bounds.one_sided import OneSided
from macer_serve.smoothing.confidence import Budget
from macer_serve.smoothing.radius import round_down
from macer_serve.smoothing.votes import Votes


class Cautious(OneSided):
    adjective = "cautious "

    def prove(self, budget: Budget, votes: Votes, top: int, *, sigma: float, tau: float) -> Proof:
        proof = super().prove(budget, votes, top, sigma=sigma, tau=tau)
        return replace(proof, radius=round_down(proof.radius / 2))


BOUND = Cautious()
