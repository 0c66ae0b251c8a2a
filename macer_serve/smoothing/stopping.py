"""Whether a run should stop at a look. No guarantee rests on it: what `prove` says of the votes is true either way."""

from __future__ import annotations

from typing import Literal

from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Votes

Decision = Literal["radius", "tolerance", "futility"]


def decided(plan: Plan, votes: Votes, top: int, radius: float, *, sigma: float, limit: int) -> Decision | None:
    """Returns why the run should stop at this look; None if more votes, at most `limit`, are worth drawing.

    `votes` are the estimation votes, `top` the class that the selection votes chose. `radius` is what they
    certify; 0 may stand for a radius below the plan's.
    """
    bound = bound_named(plan.bound)
    if plan.radius is not None:
        if radius >= plan.radius:
            return "radius"
        return "futility" if bound.hopeless(plan.budget, votes, top, plan.radius, sigma=sigma) else None
    if plan.tolerance is not None:
        hoped = bound.attainable(plan.budget, votes, top, sigma=sigma, limit=limit)
        return "tolerance" if hoped - radius <= plan.tolerance else None
    return None
