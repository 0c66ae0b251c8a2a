"""What votes prove under a plan. Pure functions of the votes.

`votes` are estimation votes (see `macer_serve.smoothing.votes`); `top` is the class that the selection votes chose.
Whoever holds a certificate can evaluate the same functions.
"""

from __future__ import annotations

import numpy as np

from macer_serve.smoothing.binomial import top_two_p_value
from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Votes, count


def prove(plan: Plan, votes: Votes, top: int, *, sigma: float, tau: float) -> Proof:
    """Returns what the votes prove: false with probability at most alpha, at whichever look the run was stopped.

    `tau` bounds the distance of the sampled noise from the exact noise, in total variation per image.
    """
    if plan.mode == "predict":
        return _predict(plan, votes, tau)
    return bound_named(plan.bound).prove(plan.budget, votes, top, sigma=sigma, tau=tau)


def may_exceed(plan: Plan, votes: Votes, top: int, radius: float, *, sigma: float, tau: float) -> bool:
    """Returns False only if `prove` would certify no more than `radius`. Cheaper than `prove`."""
    if plan.mode == "predict":
        return True
    return bound_named(plan.bound).may_exceed(plan.budget, votes, top, radius, sigma=sigma, tau=tau)


def _predict(plan: Plan, votes: Votes, tau: float) -> Proof:
    """Returns the class alone, radius 0 (Cohen et al. 2019, PREDICT). tau per image adds up over the images."""
    n = count(votes)
    second, first = np.sort(votes)[-2:].tolist() if len(votes) > 1 else (0, n)
    holds = n >= plan.n and top_two_p_value(first, second) + n * tau <= plan.alpha
    return Proof(int(votes.argmax()) if holds else None, 0.0, 0.0, 1.0)
