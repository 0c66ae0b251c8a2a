"""Selection: which class, or which group of classes, the estimation votes are to certify.

The selection votes alone decide, so that the estimation votes test one claim, and alpha is spent once. Neither the
radius nor the cap nor the alpha of a request has a part in it: all requests under one policy test the same claim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.confidence import Budget
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Votes, count, shares

# A level is expected to be certified if the selection votes alone would certify it at this alpha. It is part of the
# policy. It decides how often an answer is coarse; no guarantee rests on its size.
REFERENCE_ALPHA = 0.01


@dataclass(frozen=True, slots=True)
class Selection:
    """The claim to be certified: group `top` of a level of the plan's hierarchy. Level 0 is the classes."""

    level: int
    top: int


def select(plan: Plan, votes: Votes) -> Selection:
    """Returns the finest level at which a certificate is to be expected, and its group with the most selection votes.

    If the votes suffice for no level, the coarsest level has the best prospects. If even unanimous votes could not
    suffice, they say nothing of the levels, and the class is selected.
    """
    hierarchy = plan.hierarchy
    if hierarchy is None or count(votes) < _fewest(plan.bound):
        return Selection(0, int(shares(votes).argmax()))
    for level in range(len(hierarchy.levels) + 1):
        groups = hierarchy.totals(votes, level)
        top = int(groups.argmax())
        budget = Budget(count(votes), {"clopper-pearson": REFERENCE_ALPHA})
        if bound_named(plan.bound).prove(budget, groups, top, sigma=1.0, tau=0.0).class_id is not None:
            break
    return Selection(level, top)


@cache
def _fewest(bound: str) -> int:
    return bound_named(bound).fewest_votes(REFERENCE_ALPHA, fixed=True)
