"""A run claims the first look with the largest radius, whenever it is asked for its claim."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from macer_serve.smoothing import best_look
from macer_serve.smoothing.certification import Certification, Claim
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.stopping import decided
from macer_serve.smoothing.votes import Draw, Votes

SIGMA, TAU = 0.25, 1e-6
PLANS = {
    "tolerance": Plan(n=5_000, tolerance=0.05),
    "never": Plan(n=3_000, tolerance=1e-6),
    "radius": Plan(n=5_000, radius=0.2),
    "two-sided": Plan(n=1_000, tolerance=0.1, bound="two-sided"),
}


class Look(NamedTuple):
    radius: float
    n: int


def run_of(plan: Plan, votes: list[int], *, ask: bool) -> Claim:
    """Returns the claim of a run whose copies are voted as listed; with `ask`, it is asked for one after each draw."""
    run = Certification(plan, classes=3, sigma=SIGMA, tau=TAU)
    while isinstance(draw := run.wants(97), Draw):
        begin = 0 if draw.purpose == "selection" else plan.selection
        run.add(draw, np.bincount(votes[begin + draw.start : begin + draw.stop], minlength=3))
        if ask:
            run.claim()
    return run.claim()


def every_look(plan: Plan, votes: list[int]) -> tuple[Look, str | None, int]:
    """Returns the first look with the largest radius, why the run stops and where, by the proof of each look."""
    top = int(np.bincount(votes[: plan.selection], minlength=3).argmax())
    best = Look(0.0, 0)
    for at in plan.looks:
        seen: Votes = np.bincount(votes[plan.selection : plan.selection + at], minlength=3)
        radius = prove(plan, seen, top, sigma=SIGMA, tau=TAU).radius
        if radius > best.radius:
            best = Look(radius, at)
        why = "n" if at == plan.n else decided(plan, seen, top, radius, sigma=SIGMA, limit=plan.n)
        if why is not None:
            return best, why, at
    raise AssertionError("the last look ends every run")


@pytest.mark.parametrize("kept", [1, 100_000])
@pytest.mark.parametrize("name", PLANS)
def test_the_claim_is_that_of_the_best_look(name: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_look, "_KEPT", kept)
    dice, plan, falls = np.random.default_rng(len(name)), PLANS[name], 0
    for share in (0.5, 0.6, 0.7, 0.85, 0.97, 1.0):
        for late in (share, 0.5 * share + 0.2):  # the class loses votes: the best look is not the last
            most = plan.selection + plan.n
            chance = np.where(np.arange(most) < 700, share, late)
            votes = np.where(dice.random(most) < chance, 1, dice.integers(0, 2, most) * 2).tolist()
            best, why, at = every_look(plan, votes)
            claim = run_of(plan, votes, ask=False)
            assert (claim.radius, claim.stopped, claim.n) == (best.radius, why, at)
            if best.n:
                assert claim.proof_n == best.n
            falls += best.n not in (0, at)
            assert run_of(plan, votes, ask=True) == claim
    assert falls, "some best look is an earlier one"
