"""Whether a run should stop at a look. No guarantee rests on it: what `prove` says of the votes is true either way."""

from __future__ import annotations

import math
from typing import Literal

from scipy.special import ndtri

from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Votes, shares

Decision = Literal["radius", "tolerance", "futility"]


def decided(
    plan: Plan, votes: Votes, top: int, radius: float, *, sigma: float, limit: int, level: int = 0
) -> Decision | None:
    """Returns why the run should stop at this look; None if more votes, at most `limit`, are worth drawing.

    `votes` are the estimation votes per class, `top` the class, or the group of a level, that the selection votes
    chose. `radius` is what they certify; 0 may stand for a radius below the plan's.
    """
    bound = bound_named(plan.bound)
    votes = plan.totals(votes, level)
    if plan.radius is not None:
        if radius >= plan.radius:
            return "radius"
        return "futility" if bound.hopeless(plan.budget, votes, top, plan.radius, sigma=sigma) else None
    if plan.tolerance is not None:
        if roughly_attainable(plan, votes, top, sigma=sigma, limit=limit) - radius > plan.tolerance:
            return None
        hoped = bound.attainable(plan.budget, votes, top, sigma=sigma, limit=limit)
        return "tolerance" if hoped - radius <= plan.tolerance else None
    return None


def least_to_stop(plan: Plan, votes: Votes, top: int, *, sigma: float, limit: int, level: int = 0) -> float:
    """Returns a radius: if the votes certify no more than it, `decided` is the same as for radius 0. Cheap."""
    if plan.radius is not None:
        return math.nextafter(plan.radius, 0.0)
    if plan.tolerance is not None:
        hoped = roughly_attainable(plan, plan.totals(votes, level), top, sigma=sigma, limit=limit)
        return max(0.0, hoped - plan.tolerance) * (1.0 - 1e-9)  # so that rounding decides nothing
    return 0.0


def roughly_attainable(plan: Plan, votes: Votes, top: int, *, sigma: float, limit: int) -> float:
    """Returns less than what `limit` votes of the present share would certify. It spares most looks the exact figure.

    The share is taken as it is, not at its upper confidence limit, and bounded by the normal law with
    log(limit) added for the mixture.
    """
    share = float(shares(votes)[top])
    spent = math.log(1.0 / min(plan.alpha_split.values())) + math.log(limit)
    low = share - math.sqrt(2.0 * spent * share * (1.0 - share) / limit) - spent / limit
    return sigma * float(ndtri(low)) if 0.5 < low < 1.0 else 0.0
