"""Confidence bounds on a class's probability, by the names that a plan's split of alpha gives them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from macer_serve.errors import ParameterError
from macer_serve.smoothing import mixture
from macer_serve.smoothing.binomial import clopper_pearson_lower, clopper_pearson_upper
from macer_serve.smoothing.votes import Votes, count, levels_of


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan may spend: at most `n` votes, and of alpha what `split` gives each bound of `CONFIDENCE`.

    Raises `ParameterError` for a bound that does not exist: no other bound may take its place.
    """

    n: int
    split: dict[str, float] = field(hash=False)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.split if name not in CONFIDENCE]:
            raise ParameterError(f"there is no confidence bound {', '.join(unknown)}; known: {', '.join(CONFIDENCE)}")

    def lower(self, votes: Votes, c: int, *, sides: int) -> float:
        """Returns the highest lower bound of class c's probability; `sides` probabilities share alpha."""
        bounds = (CONFIDENCE[name].lower(votes, c, spend / sides, self.n) for name, spend in self.split.items())
        return max((bound for bound in bounds if bound is not None), default=0.0)

    def upper(self, votes: Votes, others: list[int], *, sides: int) -> float:
        """Returns the lowest upper bound of all `others` at once, which are sorted by falling share of the votes."""
        bounds = (CONFIDENCE[name].upper(votes, others, spend / sides, self.n) for name, spend in self.split.items())
        return min((bound for bound in bounds if bound is not None), default=1.0)


@dataclass(frozen=True, slots=True)
class Confidence:
    """One kind of confidence bound. Both functions return None at a number of votes at which the bound is not valid.

    `lower(votes, c, alpha, n)` bounds the probability of class c. `upper(votes, others, alpha, n)` bounds the
    probability of every class in `others`, sorted by falling share. n is the largest number of votes of the plan.
    """

    lower: Callable[[Votes, int, float, int], float | None]
    upper: Callable[[Votes, list[int], float, int], float | None]


def _clopper_pearson_lower(votes: Votes, c: int, alpha: float, n: int) -> float | None:
    return clopper_pearson_lower(int(votes[c]), n, alpha) if count(votes) == n else None


def _clopper_pearson_upper(votes: Votes, others: list[int], alpha: float, n: int) -> float | None:
    # The bound rises with the votes: the runner-up's is the highest.
    return clopper_pearson_upper(int(votes[others[0]]), n, alpha) if count(votes) == n else None


def _mixture_lower(votes: Votes, c: int, alpha: float, n: int) -> float | None:
    return mixture.probability_below(mixture.lower(*levels_of(votes, c, up=False), alpha, n))


def _mixture_upper(votes: Votes, others: list[int], alpha: float, n: int) -> float | None:
    """Returns the highest bound among the classes: one root, and one evaluation for most other classes."""
    highest = float("-inf")
    # With hard votes the bound rises with the votes. With soft votes the class whose bound seems highest comes first.
    candidates = others[:1] if votes.ndim == 1 else sorted(others, key=lambda c: -_roughly_upper(votes, c, alpha))
    for c in candidates:
        if highest == float("inf"):  # a class without any bound: no other can be higher
            break
        counts, levels = levels_of(votes, c, up=True)
        if mixture.log_evidence(*mixture.mirrored(counts, levels), -highest, n) < mixture.threshold(alpha):
            highest = mixture.upper(counts, levels, alpha, n)
    return mixture.probability_above(highest)


def _roughly_upper(votes: Votes, c: int, alpha: float) -> float:
    """Returns about the upper bound of a soft class, by mean and variance of its levels. Only an order rests on it."""
    counts, levels = levels_of(votes, c, up=True)
    n = int(counts.sum())
    mean = float(counts @ levels) / n
    variance = float(counts @ (levels - mean) ** 2) / n
    return mean + math.sqrt(-2.0 * math.log(alpha) * variance / n) - math.log(alpha) / (3.0 * n)


# A new confidence bound is a new entry here. Clopper-Pearson is valid at n alone, the mixture at every number of votes.
CONFIDENCE = {
    "mixture": Confidence(_mixture_lower, _mixture_upper),
    "clopper-pearson": Confidence(_clopper_pearson_lower, _clopper_pearson_upper),
}
