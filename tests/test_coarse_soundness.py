"""Coarse answers against a truth in closed form: false claims about classes or groups are no more frequent than alpha.

Four classes along one direction u, cut at -D, 0 and D; the groups are low (u < 0) and high. The probabilities are
differences of normal distribution functions, the boundary of the groups and of the middle classes is u = 0. Exact
binomial tests, fixed seeds, false-alarm rate 1e-6 each. A selection by the estimation votes must fail the same test.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, norm

from macer_serve.smoothing import certification
from macer_serve.smoothing.certificate import shown_group
from macer_serve.smoothing.certification import Certification, Claim, Done, Draw
from macer_serve.smoothing.hierarchy import Hierarchy
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.selection import Selection, select
from macer_serve.smoothing.votes import Votes

SIGMA, ALPHA, FALSE_ALARM = 0.25, 0.05, 1e-6
# Runs by kind of plan, since some evaluate a hundred looks. Ten times as many were made once: results/coarse-runs.txt.
TIMES = int(os.environ.get("MACER_COARSE_TIMES", "1"))
RUNS = {"fixed": 600 * TIMES, "radius": 30 * TIMES, "tolerance": 60 * TIMES}
GROUPS = Hierarchy.from_json({"low": [0, 1], "high": [2, 3]})
SPLIT, TIED = -0.31, 0.0  # u / sigma: where the rule takes either level about half of the time, and the boundary
PLANS = [
    Plan(n0=100, n=300, alpha=ALPHA, bound=bound, hierarchy=GROUPS, **stop)
    for bound in ("one-sided", "two-sided")
    for stop in ({}, {"radius": 0.1}, {"tolerance": 0.05})
]


def probabilities(u: float, cut: float) -> np.ndarray:
    """The classes' probabilities at u, in units of sigma."""
    return np.diff(norm.cdf([-np.inf, -cut - u, -u, cut - u, np.inf]))


def truth(u: float, cut: float) -> tuple[int, float, int, float]:
    """The class with its distance to the nearest other class, and the group with its; radii of 0 on the boundary."""
    outer = brentq(lambda at: np.subtract(*probabilities(at, cut)[:2]), -cut - 9, -1e-9)
    middle = outer < u <= -outer
    class_id = (1 if u < 0 else 2) if middle else (0 if u < 0 else 3)
    to_class = min(abs(u), abs(u - outer), abs(u + outer)) if middle else abs(abs(u) + outer)
    return class_id, SIGMA * to_class, int(u >= 0), SIGMA * abs(u)


def claimed(plan: Plan, u: float, cut: float, generator: np.random.Generator) -> tuple[Claim, Certification]:
    p = probabilities(u, cut)
    winners = {k: generator.choice(4, n, p=p) for k, n in (("selection", plan.n0), ("estimation", plan.n))}
    run = Certification(plan, classes=4, sigma=SIGMA)
    while not isinstance(want := run.wants(), Done):
        assert isinstance(want, Draw)
        run.add(want, np.bincount(winners[want.purpose][want.start : want.stop], minlength=4))
    return run.claim(), run


def false_share(plan: Plan, u: float, cut: float, runs: int) -> tuple[int, int, int]:
    """Of the runs, how many claim falsely with coarse answers or without; and how many chose each level."""
    generator, levels, false = np.random.default_rng(7), [0, 0], 0
    class_id, to_class, group, to_group = truth(u, cut)
    for _ in range(runs):
        claim, run = claimed(plan, u, cut, generator)
        levels[claim.level] += 1
        hidden = replace(plan, coarse=False)
        wrong = []
        for asked in (plan, hidden):  # a client who asks both ways and takes either
            if claim.class_id is not None:
                wrong.append(claim.class_id != class_id or claim.radius > to_class)
            elif shown_group(claim, asked) is not None:
                wrong.append(claim.group != group or claim.radius > to_group)
        assert shown_group(claim, hidden) is None
        assert run.plan == plan
        false += any(wrong)
    return false, *levels


def assert_sound(plan: Plan, u: float, cut: float, runs: int | None = None) -> tuple[int, int]:
    runs = runs or RUNS[plan.kind]
    false, fine, coarse = false_share(plan, u, cut, runs)
    p = float(binom.sf(false - 1, runs, ALPHA))
    print(f"{plan.bound}, {plan.kind}, u = {u} sigma: {false} of {runs} claims false, p = {p:.2g}; coarse: {coarse}")
    assert p >= FALSE_ALARM, f"{false} of {runs} claims are false at alpha = {ALPHA}: p = {p:.2g}"
    return fine, coarse


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.bound}, {p.kind}")
def test_false_claims_are_no_more_than_alpha(plan: Plan) -> None:
    fine, coarse = assert_sound(plan, SPLIT, 4.0)
    if plan.bound == "one-sided":
        assert min(fine, coarse) > RUNS[plan.kind] / 10  # both levels are put to the test
    _, coarse = assert_sound(plan, TIED, 1.5)
    assert coarse > RUNS[plan.kind] / 2


@pytest.mark.parametrize("plan", PLANS[::3], ids=lambda p: f"{p.bound}, {p.kind}")
def test_an_adversary_among_selections_gains_nothing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soundness does not rest on the rule: here the level and the group are anything that the selection votes say."""

    def adversary(plan: Plan, votes: Votes) -> Selection:
        return Selection(int(votes[1]) % 2, int(votes[1]) % 2 if votes[1] % 2 else 1 + int(votes[2]) % 2)

    monkeypatch.setattr(certification, "select", adversary)
    assert min(assert_sound(plan, SPLIT, 4.0)) > RUNS[plan.kind] / 4
    assert_sound(plan, TIED, 4.0)


def test_a_group_picked_by_the_estimation_votes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Already with two groups it is false with 2 alpha."""
    plan = PLANS[0]

    def picked(self: Certification, votes: Votes) -> object:
        best = [
            (prove(plan, votes, top, sigma=SIGMA, tau=0.0, level=level), level)
            for level, tops in ((1, (0, 1)), (0, (1, 2)))
            for top in tops
        ]
        proof, level = max(best, key=lambda found: found[0].radius)
        self._selected = Selection(level, 0)
        return proof

    monkeypatch.setattr(Certification, "_proof", picked)
    with pytest.raises(AssertionError, match="claims are false"):
        assert_sound(plan, TIED, 4.0, runs=3000)


def test_the_finest_level_is_chosen_that_the_selection_votes_would_certify() -> None:
    plan = Plan(n=1000, hierarchy=GROUPS)
    assert select(plan, np.array([0, 80, 20, 0])) == Selection(0, 1)
    assert select(plan, np.array([40, 40, 20, 0])) == Selection(1, 0)
    assert select(plan, np.array([25, 25, 25, 25])) == Selection(1, 0)  # nothing is promised: the best prospects
    assert select(plan, np.array([2, 1, 1, 0])) == Selection(0, 0)  # too few votes to tell
    for other in ({"alpha": 0.2}, {"radius": 0.5}, {"tolerance": 0.1}, {"n": 50}, {"coarse": False}):
        assert select(replace(plan, **other), np.array([20, 42, 20, 18])) == Selection(1, 0)
    two_sided = replace(plan, bound="two-sided")
    assert select(two_sided, np.array([20, 42, 20, 18])).level == 1
    assert select(two_sided, np.array([10, 60, 15, 15])) == Selection(0, 1)


def test_two_sided_upper_bounds_are_over_groups() -> None:
    """Votes 30 / 30 / 40 / 0: class 2 leads, but low leads over high."""
    plan = Plan(n=1000, bound="two-sided", hierarchy=GROUPS)
    votes = np.array([300, 300, 400, 0])
    low = prove(plan, votes, 0, sigma=SIGMA, tau=0.0, level=1)
    assert low == prove(Plan(n=1000, bound="two-sided"), np.array([600, 400]), 0, sigma=SIGMA, tau=0.0)
    assert low.class_id == 0
    assert low.p_upper > 0.4
