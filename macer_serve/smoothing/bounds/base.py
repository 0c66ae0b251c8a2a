"""What a bound is: from votes to a proof, and whether more votes are worth drawing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from macer_serve.smoothing import mixture
from macer_serve.smoothing.binomial import smallest
from macer_serve.smoothing.confidence import Budget
from macer_serve.smoothing.radius import round_down, two_sided_radius
from macer_serve.smoothing.votes import SOFT_LEVELS, Votes, levels_of, shares

# The level at which a run is given up as hopeless. It wastes or saves votes; no guarantee rests on it.
FUTILITY = 0.05
# What the anytime-valid mixture may spend of alpha, and Clopper-Pearson, once, at n. They sum to 1.
MIXTURE_SHARE, LAST_SHARE = 0.8, 0.2


@dataclass(frozen=True, slots=True)
class Proof:
    """What is proved. `class_id` is None if nothing is certified.

    `radius` is L2, in pixel values in [0, 1], rounded down. `p_lower` bounds the probability of the class, `p_upper`
    the probability of every other class.
    """

    class_id: int | None
    radius: float
    p_lower: float
    p_upper: float


class Bound(ABC):
    """How bounds on class probabilities become a certificate.

    `top` is the class that the selection votes chose. `tau` bounds the distance of the sampled noise from the exact
    noise, in total variation per image. `sigma` is in pixel values in [0, 1].
    """

    soft: ClassVar[bool] = False  # whether it takes soft votes
    sides: ClassVar[int] = 2  # how many probabilities share alpha: p_A, and the true runner-up's
    adjective: ClassVar[str] = ""  # of the smoothed classifier, in a certificate's statement

    def alpha_fractions(self, *, fixed: bool) -> dict[str, float]:
        """Returns what each confidence bound may spend, as fractions of alpha; `fixed` plans have one look."""
        return {"clopper-pearson": 1.0} if fixed else {"mixture": MIXTURE_SHARE, "clopper-pearson": LAST_SHARE}

    def fewest_votes(self, alpha: float, *, fixed: bool) -> int:
        """Returns the smallest n with which a plan can certify a class: n unanimous votes suffice, n - 1 do not."""

        def certifies(n: int) -> bool:
            votes = np.array([n, 0])
            if self.soft:  # one class at the highest level, the other class at the lowest
                votes = np.zeros((2, SOFT_LEVELS), dtype=np.int64)
                votes[0, -1] = votes[1, 0] = n
            budget = Budget(n, {name: share * alpha for name, share in self.alpha_fractions(fixed=fixed).items()})
            return self.prove(budget, votes, 0, sigma=1.0, tau=0.0).class_id == 0

        return smallest(certifies)

    @abstractmethod
    def prove(self, budget: Budget, votes: Votes, top: int, *, sigma: float, tau: float) -> Proof:
        """Returns what the votes prove: false with probability at most alpha."""

    @abstractmethod
    def attainable(self, budget: Budget, votes: Votes, top: int, *, sigma: float, limit: int) -> float:
        """Returns the radius that `limit` votes would prove if p_A were as large as the votes allow."""

    def shortfall(self, p_upper: float, what: str = "class") -> str:
        """Returns the words that follow "is certain to hold only so much of the noise" in an abstention.

        `what` was to be certified: a class or a group.
        """
        return f", while another {what} may hold {math.ceil(1000 * p_upper) / 10:.1f} %"

    def may_exceed(self, budget: Budget, votes: Votes, top: int, radius: float, *, sigma: float, tau: float) -> bool:
        """Returns False only if `prove` would certify no more than `radius`. Bounds with a cheaper test override it."""
        return True

    def hopeless(self, budget: Budget, votes: Votes, top: int, radius: float, *, sigma: float) -> bool:
        """Returns whether the votes refute, at level `FUTILITY`, that the radius can be certified."""
        most, least = self.limits(budget, votes, top)
        return two_sided_radius(most, max(least, 1e-12), sigma) < radius

    def limits(self, budget: Budget, votes: Votes, top: int) -> tuple[float, float]:
        """Returns the largest p_A and the smallest runner-up's probability that the votes allow.

        Both at level `FUTILITY`.
        """
        share = shares(votes)
        share[top] = -1.0
        runner_up = int(share.argmax())
        log_odds = mixture.lower(*levels_of(votes, runner_up, up=False), FUTILITY, budget.n)
        return most_of(budget, votes, top), mixture.probability_below(log_odds)


def most_of(budget: Budget, votes: Votes, c: int) -> float:
    """Returns the largest probability of class c that the votes allow, at level `FUTILITY`."""
    return mixture.probability_above(mixture.upper(*levels_of(votes, c, up=True), FUTILITY, budget.n))


def both_sides(bound: Bound, budget: Budget, votes: Votes, top: int, tau: float) -> tuple[float, float]:
    """Returns the lower bound of p_A and the upper bound of every other class."""
    others = [c for c in np.argsort(-shares(votes)).tolist() if c != top]
    p_lower = less_tau(budget.lower(votes, top, sides=bound.sides), tau)
    p_upper = more_tau(budget.upper(votes, others, sides=bound.sides) if others else 0.0, tau)
    return p_lower, p_upper


def proof_of(top: int, radius: float, p_lower: float, p_upper: float) -> Proof:
    """Returns the proof of class `top`, or of nothing if the bounds overlap."""
    return Proof(top if p_lower > p_upper else None, round_down(radius), p_lower, p_upper)


def less_tau(p_lower: float, tau: float) -> float:
    """Returns a lower bound less tau. One step further down: a tau below the last digit must not be lost."""
    return max(0.0, math.nextafter(p_lower - tau, 0.0)) if tau > 0.0 else p_lower


def more_tau(p_upper: float, tau: float) -> float:
    """Returns an upper bound plus tau, one step further up."""
    return min(1.0, math.nextafter(p_upper + tau, 2.0)) if tau > 0.0 else p_upper
