"""The state machine: one claim per set of votes, whatever the cutting and order; no vote is counted twice or reused."""

from __future__ import annotations

import math
import random
from dataclasses import FrozenInstanceError

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from macer_serve.errors import ParameterError
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.certification import Certification, Claim, Done, Waiting
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.radius import round_down
from macer_serve.smoothing.votes import Draw

SIGMA = 0.25
Winners = dict[str, npt.NDArray[np.int64]]


def winners(plan: Plan, classes: int, seed: int, share: float = 0.8) -> Winners:
    """The class of every copy of both streams; class 1 wins `share` of them, the rest is spread evenly."""
    generator = np.random.default_rng(seed)
    p = np.full(classes, (1 - share) / (classes - 1))
    p[1] = share
    return {
        purpose: generator.choice(classes, k, p=p) for purpose, k in [("selection", plan.n0), ("estimation", plan.n)]
    }


def votes(of: Winners, draw: Draw, classes: int) -> npt.NDArray[np.int64]:
    return np.bincount(of[draw.purpose][draw.start : draw.stop], minlength=classes)


def in_order(run: Certification, of: Winners, size: int | None = None) -> Claim:
    while not isinstance(want := run.wants(size), Done):
        assert isinstance(want, Draw)
        run.add(want, votes(of, want, run.classes))
    return run.claim()


def at_random(run: Certification, of: Winners, dice: random.Random, window: int) -> tuple[Claim, int]:
    """Random sizes, up to `window` draws in flight, cut further, returned in any order; the claim, the copies drawn."""
    flying: list[Draw] = []
    drawn = 0
    while True:
        want: Draw | Waiting | Done = Waiting()
        if len(flying) < window:
            want = run.wants(dice.choice([None, 1, 3, 17, 100]))
        if isinstance(want, Done):
            break
        if isinstance(want, Draw):
            drawn += len(want)
            flying += want.cut(dice.randint(1, len(want)))
        if flying and (isinstance(want, Waiting) or dice.random() < 0.5):
            draw = flying.pop(dice.randrange(len(flying)))
            run.add(draw, votes(of, draw, run.classes))
    assert not flying
    return run.claim(), drawn


PLANS = st.builds(Plan, n0=st.integers(1, 120), n=st.integers(1, 700), alpha=st.sampled_from([0.001, 0.05, 0.4]))


@settings(max_examples=150, deadline=None)
@given(
    PLANS, st.integers(2, 10), st.integers(0, 2**32), st.sampled_from([0.34, 0.55, 0.8, 0.99, 1.0]), st.integers(1, 40)
)
def test_the_claim_does_not_depend_on_the_driver(
    plan: Plan, classes: int, seed: int, share: float, window: int
) -> None:
    of = winners(plan, classes, seed, share)
    reference = in_order(Certification(plan, classes=classes, sigma=SIGMA), of)
    run = Certification(plan, classes=classes, sigma=SIGMA)
    claim, drawn = at_random(run, of, random.Random(seed), window)
    assert claim == reference
    assert drawn == run.drawn == plan.n0 + plan.n
    assert claim.stopped == "n"
    assert claim.n == plan.n == sum(claim.votes)
    assert sum(claim.selection_votes) == plan.n0


def cohens_certify(of: Winners, plan: Plan, classes: int) -> tuple[int | None, float]:
    """CERTIFY of Cohen et al. 2019, section 3.2.2, line by line."""
    counts0 = np.bincount(of["selection"], minlength=classes)
    c_a = int(counts0.argmax())
    counts = np.bincount(of["estimation"], minlength=classes)
    p_a = proportion_confint(counts[c_a], plan.n, alpha=2 * plan.alpha, method="beta")[0]
    return (c_a, SIGMA * float(norm.ppf(p_a))) if p_a > 0.5 else (None, 0.0)


@settings(max_examples=150, deadline=None)
@given(PLANS, st.integers(2, 10), st.integers(0, 2**32), st.sampled_from([0.5, 0.55, 0.6, 0.8, 0.99, 1.0]))
def test_it_is_cohens_certify(plan: Plan, classes: int, seed: int, share: float) -> None:
    of = winners(plan, classes, seed, share)
    claim = in_order(Certification(plan, classes=classes, sigma=SIGMA), of, 64)
    class_id, radius = cohens_certify(of, plan, classes)
    assert claim.class_id == class_id
    assert claim.radius <= radius <= claim.radius + 1.002e-6
    assert claim.radius == round_down(radius) or radius == 0.0


def test_selection_votes_are_never_in_the_estimate() -> None:
    """Selection says class 1 unanimously; the estimate sees class 0 only: nothing of the former may remain."""
    plan = Plan(n0=500, n=100, alpha=0.05)
    of = {"selection": np.ones(500, np.int64), "estimation": np.zeros(100, np.int64)}
    claim = in_order(Certification(plan, classes=2, sigma=SIGMA), of)
    assert (claim.top_class, claim.class_id, claim.p_lower, claim.radius) == (1, None, 0.0, 0.0)
    assert claim.selection_votes == (0, 500)
    assert claim.votes == (100, 0)


def test_the_class_is_chosen_by_selection_votes_alone() -> None:
    """Swapping every estimation vote changes what is proved of the selected class, never which one is selected."""
    plan = Plan(n0=99, n=400, alpha=0.05)
    of = winners(plan, 2, seed=1, share=0.6)
    swapped = {"selection": of["selection"], "estimation": 1 - of["estimation"]}
    one, other = (in_order(Certification(plan, classes=2, sigma=SIGMA), w) for w in (of, swapped))
    assert one.top_class == other.top_class == 1
    assert one.class_id == 1
    assert other.class_id is None


def begun(plan: Plan | None = None) -> Certification:
    """A run whose every draw is handed out, 10 selection and 100 estimation copies, none of them returned."""
    run = Certification(plan or Plan(n0=10, n=100, alpha=0.05), classes=2, sigma=SIGMA)
    while isinstance(run.wants(10), Draw):
        pass
    return run


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 10), (0, 10)),  # the same again
        ((0, 10), (5, 15)),  # overlapping what is counted
        ((0, 10), (2, 4)),  # inside what is counted
        ((20, 30), (20, 30)),  # the same again, ahead of the prefix
        ((20, 30), (25, 35)),
        ((20, 30), (15, 25)),
        ((20, 30), (10, 40)),  # around what waits
        ((20, 30), (22, 24)),
        ((20, 30), (20, 20)),  # empty: it would displace the votes that wait
    ],
)
def test_no_copy_is_counted_twice(first: tuple[int, int], second: tuple[int, int]) -> None:
    run = begun()
    run.add(Draw("estimation", *first), [first[1] - first[0], 0])
    before = run.drawn
    with pytest.raises(ValueError, match="not asked for, or its votes are counted already"):
        run.add(Draw("estimation", *second), [second[1] - second[0], 0])
    assert run.drawn == before


@pytest.mark.parametrize("draw", [Draw("estimation", 95, 105), Draw("estimation", -5, 5), Draw("selection", 10, 20)])
def test_copies_that_were_not_asked_for_are_refused(draw: Draw) -> None:
    with pytest.raises(ValueError, match="not asked for"):
        begun().add(draw, [10, 0])
    fresh = Certification(Plan(n0=10, n=100), classes=2, sigma=SIGMA)
    with pytest.raises(ValueError, match="not asked for"):
        fresh.add(Draw("estimation", 0, 10), [10, 0])


@pytest.mark.parametrize(
    "wrong",
    [
        [9, 0],
        [11, 0],
        [5, 4, 1],
        [10],
        [12, -2],
        [[5, 5]],
        [5.5, 5.5],  # would be cut to 5 + 5
        [5.0, 5.0],
        [True, False],
        [2**63 + 10, 2**63],  # sums to 10 modulo 2^64
        [math.nan, 10],
    ],
)
def test_votes_that_do_not_add_up_are_refused(wrong: list[object]) -> None:
    run = begun()
    with pytest.raises(ValueError, match="needs 10 votes over 2 classes"):
        run.add(Draw("estimation", 0, 10), wrong)
    run.add(Draw("estimation", 0, 10), [4, 6])  # the run is intact
    assert run.claim().votes == (4, 6)


def test_votes_that_sum_right_only_modulo_two_to_the_64_are_refused() -> None:
    run = Certification(Plan(n0=10, n=100), classes=4, sigma=SIGMA)
    draw = run.wants(10)
    assert isinstance(draw, Draw)
    with pytest.raises(ValueError, match="needs 10 votes"):
        run.add(draw, np.array([2**62, 2**62, 2**62, 2**62 + 10]))


def test_an_unknown_purpose_is_refused() -> None:
    with pytest.raises(ValueError, match="purpose"):
        begun().add(Draw("rehearsal", 0, 10), [10, 0])  # type: ignore[arg-type]


def test_votes_that_wait_are_the_runs_own() -> None:
    """A voter may reuse its buffer."""
    run, buffer = begun(), np.array([2, 8])
    run.add(Draw("estimation", 10, 20), buffer)
    buffer[:] = [0, 10]
    run.add(Draw("estimation", 0, 10), buffer)
    assert run.claim().votes == (2, 18)
    buffer[:] = [10, 0]
    assert run.claim().votes == (2, 18)


def feed(run: Certification, upto: int) -> None:
    """All selection votes and `upto` estimation votes, all for class 1."""
    while isinstance(want := run.wants(10), Draw):
        if want.purpose == "selection" or want.stop <= upto:
            run.add(want, [0, len(want)])
        elif want.start >= upto:
            return


@pytest.mark.parametrize("upto", [0, 50, 990])
def test_nothing_is_claimed_before_the_look(upto: int) -> None:
    run = Certification(Plan(n0=10, n=1000), classes=2, sigma=SIGMA)
    feed(run, upto)
    claim = run.claim()
    assert claim.abstained
    assert (claim.class_id, claim.radius, claim.p_lower, claim.stopped, claim.n) == (None, 0.0, 0.0, None, upto)


def test_nothing_is_claimed_before_the_class_is_selected() -> None:
    run = Certification(Plan(n0=10, n=100), classes=2, sigma=SIGMA)
    while isinstance(want := run.wants(), Draw):
        if want.purpose == "estimation":
            run.add(want, [0, len(want)])
    assert isinstance(run.wants(), Waiting)
    claim = run.claim()
    assert (claim.top_class, claim.class_id, claim.radius, claim.stopped) == (None, None, 0.0, None)


def test_a_deadline_abstains_honestly() -> None:
    run = Certification(Plan(n0=10, n=1000), classes=2, sigma=SIGMA)
    feed(run, 990)
    run.stop("deadline")
    assert isinstance(run.wants(), Done)
    claim = run.claim()
    assert (claim.class_id, claim.radius, claim.stopped, claim.n) == (None, 0.0, "deadline", 990)


def test_a_deadline_after_the_last_vote_takes_nothing_back() -> None:
    run = Certification(Plan(n0=10, n=1000), classes=2, sigma=SIGMA)
    feed(run, 1000)
    run.stop("deadline")
    assert run.claim().stopped == "n"
    assert run.claim().class_id == 1


@pytest.mark.parametrize("cap", [1, 10, 999])
def test_a_cap_ends_the_run_and_adds_no_look(cap: int) -> None:
    plan = Plan(n0=10, n=1000, alpha=0.05)
    run = Certification(plan, classes=2, sigma=SIGMA, cap=cap)
    of = winners(plan, 2, seed=3, share=1.0)
    claim = in_order(run, of, 7)
    assert (claim.class_id, claim.radius, claim.p_lower, claim.stopped, claim.n) == (None, 0.0, 0.0, "cap", cap)
    assert run.drawn == plan.n0 + cap


@pytest.mark.parametrize("cap", [1000, 10**9])
def test_a_cap_at_or_above_n_is_none(cap: int) -> None:
    plan = Plan(n0=10, n=1000, alpha=0.05)
    of = winners(plan, 2, seed=3)
    capped, plain = (in_order(Certification(plan, classes=2, sigma=SIGMA, cap=c), of) for c in (cap, None))
    assert capped == plain
    assert capped.class_id == 1


@pytest.mark.parametrize("tau", [1e-18, 1.9e-13, 1e-3, 0.2, 2.0])
def test_tau_is_taken_off(tau: float) -> None:
    plan = Plan(n0=10, n=1000, alpha=0.001)
    of = winners(plan, 2, seed=5, share=0.8)
    plain, less = (in_order(Certification(plan, classes=2, sigma=SIGMA, tau=t), of) for t in (0.0, tau))
    successes = int((of["estimation"] == 1).sum())
    assert plain.p_lower == clopper_pearson_lower(successes, plan.n, plan.alpha)
    assert less.p_lower < plain.p_lower  # however small: rounding must not swallow it
    assert less.p_lower == pytest.approx(max(0.0, plain.p_lower - tau), abs=3e-16)
    assert less.radius <= plain.radius
    assert less.abstained == (less.p_lower <= 0.5)


def test_tau_can_turn_a_claim_into_an_abstention() -> None:
    plan = Plan(n0=10, n=1000, alpha=0.05)
    of = {"selection": np.ones(10, np.int64), "estimation": np.array([1] * 528 + [0] * 472)}
    p = clopper_pearson_lower(528, 1000, 0.05)
    assert 0.5 < p < 0.502
    assert in_order(Certification(plan, classes=2, sigma=SIGMA), of).class_id == 1
    assert in_order(Certification(plan, classes=2, sigma=SIGMA, tau=0.003), of).class_id is None


@pytest.mark.parametrize("options", [{"tau": -1e-9}, {"tau": math.nan}, {"cap": 0}, {"cap": -1}])
def test_a_run_refuses_senseless_options(options: dict[str, float]) -> None:
    with pytest.raises(ParameterError):
        Certification(Plan(), classes=2, sigma=SIGMA, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, -100])
def test_a_draw_has_copies(size: int) -> None:
    run = Certification(Plan(), classes=2, sigma=SIGMA)
    with pytest.raises(ParameterError):
        run.wants(size)


def test_draws_cut_into_consecutive_pieces() -> None:
    draw = Draw("estimation", 3, 20)
    pieces = draw.cut(5)
    assert [len(p) for p in pieces] == [5, 5, 5, 2]
    assert [p.start for p in pieces] + [20] == [3] + [p.stop for p in pieces]


@pytest.mark.parametrize(
    "values",
    [
        {"n0": 0}, {"n0": 10**6 + 1}, {"n": 0}, {"n": -5}, {"n": 10**7 + 1}, {"n": 1000.0}, {"n0": 10.5}, {"n": True},
        {"alpha": 0.0}, {"alpha": 0.5}, {"alpha": 1.0}, {"alpha": -0.1}, {"alpha": math.nan}, {"alpha": math.inf},
    ],
)  # fmt: skip
def test_a_plan_outside_its_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match="between"):
        Plan(**values)  # type: ignore[arg-type]


def test_a_plan_is_cohens_by_default_frozen_and_says_how_alpha_is_spent() -> None:
    plan = Plan()
    assert (plan.n0, plan.n, plan.alpha, plan.looks) == (100, 100_000, 0.001, (100_000,))
    record = plan.to_json()
    assert sum(record["alpha_split"].values()) == record["alpha"] == plan.alpha
    assert "looks" not in record
    with pytest.raises(FrozenInstanceError):
        plan.n = 5  # type: ignore[misc]
