"""What votes prove under a plan. Pure functions of the votes.

`votes` are estimation votes per class (see `macer_serve.smoothing.votes`). `top` is the class that the selection votes
chose, or the group of a `level` of the plan's hierarchy. Groups are counted like classes: the votes of a group are the
sum of its classes' votes. Whoever holds a certificate can evaluate the same functions.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from macer_serve.smoothing.binomial import smallest, top_two_p_value
from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Votes, count


def prove(plan: Plan, votes: Votes, top: int, *, sigma: float, tau: float, level: int = 0) -> Proof:
    """Returns what the votes prove: false with probability at most alpha, at whichever look the run was stopped.

    `tau` bounds the distance of the sampled noise from the exact noise, in total variation per image.
    """
    if plan.mode == "predict":
        return _predict(plan, votes, tau)
    groups = plan.totals(votes, level)
    return bound_named(plan.bound).prove(plan.budget, groups, top, sigma=sigma, tau=tau)


def may_exceed(plan: Plan, votes: Votes, top: int, radius: float, *, sigma: float, tau: float, level: int = 0) -> bool:
    """Returns False only if `prove` would certify no more than `radius`. Cheaper than `prove`."""
    if plan.mode == "predict":
        return True
    groups = plan.totals(votes, level)
    return bound_named(plan.bound).may_exceed(plan.budget, groups, top, radius, sigma=sigma, tau=tau)


@lru_cache(maxsize=256)  # every abstention asks
def too_few_votes(plan: Plan) -> str | None:
    """Returns in words that the plan can prove nothing, because even unanimous votes would be too few; else None."""
    if plan.mode == "predict":
        fewest = smallest(lambda n: top_two_p_value(n, 0) <= plan.alpha)
    else:
        fewest = bound_named(plan.bound).fewest_votes(plan.alpha, fixed=plan.kind == "fixed")
    if plan.n >= fewest:
        return None
    votes = "1 vote proves" if plan.n == 1 else f"{plan.n:,} votes, even unanimous, prove"
    return f"{votes} nothing at alpha {plan.alpha:g}: at least {fewest:,} votes are needed"


def _predict(plan: Plan, votes: Votes, tau: float) -> Proof:
    """Returns the class alone, radius 0 (Cohen et al. 2019, PREDICT). tau per image adds up over the images."""
    n = count(votes)
    second, first = np.sort(votes)[-2:].tolist() if len(votes) > 1 else (0, n)
    holds = n >= plan.n and top_two_p_value(first, second) + n * tau <= plan.alpha
    return Proof(int(votes.argmax()) if holds else None, 0.0, 0.0, 1.0)
