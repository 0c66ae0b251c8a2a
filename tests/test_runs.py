"""Runs under every plan and bound: one claim per set of votes, whatever the cutting, order and lateness."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import any_plan, finish
from scipy.special import ndtr

from macer_serve.smoothing.certification import Certification, Claim, Done, Waiting
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.votes import SOFT_LEVELS, Draw, count, from_record

SIGMA = 0.25
Votes = npt.NDArray[np.int64]


class Copies:
    """The votes of every copy of both streams: class 1 wins `share` of them, softly by the level 900 of 1,024."""

    def __init__(self, plan: Plan, classes: int, seed: int, share: float) -> None:
        generator = np.random.default_rng(seed)
        law = np.full(classes, (1 - share) / (classes - 1))
        law[1] = share
        self.of = {p: generator.choice(classes, 400, p=law) for p in ("selection", "estimation")}
        self.classes = classes

    def votes(self, draw: Draw) -> Votes:
        winners = np.bincount(self.of[draw.purpose][draw.start : draw.stop], minlength=self.classes)
        if draw.beta is None:
            return winners
        votes = np.zeros((self.classes, SOFT_LEVELS), np.int64)
        votes[:, 900], votes[:, 10] = winners, len(draw) - winners
        return votes

    def in_order(self, run: Certification, size: int | None = None) -> Claim:
        while not isinstance(want := run.wants(size), Done):
            assert isinstance(want, Draw)
            run.add(want, self.votes(want))
        return run.claim()


@settings(max_examples=120, deadline=None)
@given(
    any_plan(), st.integers(2, 5), st.integers(0, 2**32), st.sampled_from([0.5, 0.7, 0.9, 0.99, 1.0]),
    st.integers(1, 20), st.one_of(st.none(), st.integers(1, 400)),
)  # fmt: skip
def test_the_claim_does_not_depend_on_the_driver(
    plan: Plan, classes: int, seed: int, share: float, window: int, cap: int | None
) -> None:
    """Whatever the sizes of draws, how many are in flight, how they are cut, in which order they come, or how late."""
    copies = Copies(plan, classes, seed, share)
    reference = copies.in_order(Certification(plan, classes=classes, sigma=SIGMA, cap=cap))
    run, dice, flying = Certification(plan, classes=classes, sigma=SIGMA, cap=cap), random.Random(seed), []
    looks = [0, *plan.looks]
    while True:
        want: Draw | Waiting | Done = Waiting()
        if len(flying) < window:
            want = run.wants(dice.choice([None, 1, 3, 17, 100]))
        if isinstance(want, Done):
            break
        if isinstance(want, Draw):
            if want.purpose == "estimation":  # never across a look
                assert not any(want.start < look < want.stop for look in looks)
                assert want.stop <= min(cap or plan.n, plan.n)
            flying += want.cut(dice.randint(1, len(want)))
        if flying and (isinstance(want, Waiting) or dice.random() < 0.5):
            draw = flying.pop(dice.randrange(len(flying)))
            run.add(draw, copies.votes(draw))
    claim = run.claim()
    assert claim == reference
    dice.shuffle(flying)
    for draw in flying:  # what comes in after the end changes nothing
        run.add(draw, copies.votes(draw))
    assert run.claim() == reference
    assert claim.stopped is not None
    assert claim.n in looks or (claim.stopped == "cap" and claim.n == cap)
    if claim.stopped == "radius":
        assert plan.radius is not None
        assert claim.radius >= plan.radius


@settings(max_examples=80, deadline=None)
@given(any_plan(), st.integers(0, 2**32), st.sampled_from([0.7, 0.99]), st.integers(1, 400))
def test_a_deadline_claims_what_the_last_look_proved(plan: Plan, seed: int, share: float, until: int) -> None:
    """Of a sequential plan a valid claim, of a fixed one nothing, and never of votes beyond a look."""
    copies, run = Copies(plan, 3, seed, share), Certification(plan, classes=3, sigma=SIGMA)
    while isinstance(want := run.wants(7), Draw) and (want.purpose == "selection" or want.stop <= until):
        run.add(want, copies.votes(want))
    run.stop("deadline")
    claim = run.claim()
    assert claim.stopped is not None
    if claim.stopped != "deadline":
        return
    votes = from_record(claim.votes, soft=plan.bound == "soft")
    assert count(votes) == claim.n < plan.n
    if plan.kind == "fixed" or claim.n == 0:
        assert (claim.class_id, claim.radius, claim.p_lower) == (None, 0.0, 0.0)
    else:
        assert claim.n in plan.looks
        assert claim.top_class is not None
        expected = prove(plan, votes, claim.top_class, sigma=SIGMA, tau=0.0)
        assert (claim.class_id, claim.radius, claim.p_lower) == (expected.class_id, expected.radius, expected.p_lower)


@pytest.mark.parametrize("bound", ["one-sided", "two-sided"])
@pytest.mark.parametrize("radius", [1e-7, 0.1, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("share", [0.7, 0.9, 0.99, 1.0])
def test_a_radius_that_is_decided_is_proved(bound: Any, radius: float, share: float) -> None:
    plan = Plan(n=20_000, alpha=0.001, radius=radius, bound=bound)
    winners = (np.random.default_rng(1).random(plan.n) < share).astype(np.int64)
    claim = finish(Certification(plan, classes=2, sigma=SIGMA, tau=1e-9), winners)
    assert (claim.stopped == "radius") == (claim.radius >= radius)
    assert (claim.stopped == "radius") == (share > ndtr(radius / SIGMA))  # none of these is a close call
    assert claim.n < plan.n


@pytest.mark.parametrize("bound", ["one-sided", "two-sided"])
@pytest.mark.parametrize("law", [(0.45, 0.2, *[0.05] * 7), (0.9, 0.1), (0.99, 0.005, 0.005), (0.3, 0.7)])
def test_a_tolerance_is_kept(bound: Any, law: tuple[float, ...]) -> None:
    """What all n votes would have proved is above the claim by no more than t."""
    plan = Plan(n=50_000, alpha=0.001, tolerance=0.05, bound=bound)
    winners = np.random.default_rng(2).choice(len(law), plan.n, p=law)
    swapped = np.where(winners == 0, 1, np.where(winners == 1, 0, winners))  # class 1 is the selected one
    claim = finish(Certification(plan, classes=len(law), sigma=SIGMA), swapped)
    assert claim.stopped == "tolerance"
    assert claim.n < plan.n / 2
    everything = prove(plan, np.bincount(swapped, minlength=len(law)), 1, sigma=SIGMA, tau=0.0).radius
    assert everything - claim.radius <= 0.05


def test_a_draw_that_crosses_a_look_is_refused() -> None:
    """It would be counted whole, at a look that states fewer votes."""
    run = Certification(Plan(n0=1, n=1000, radius=0.1), classes=2, sigma=SIGMA)
    draws = [run.wants() for _ in range(4)]
    assert [(d.start, d.stop) for d in draws if isinstance(d, Draw)] == [(0, 1), (0, 16), (16, 17), (17, 18)]
    with pytest.raises(ValueError, match="crosses the look at 16"):
        run.add(Draw("estimation", 0, 17), [0, 17])
    run.add(Draw("estimation", 0, 16), [0, 16])
