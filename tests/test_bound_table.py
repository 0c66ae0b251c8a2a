"""A bound is one file and one entry of a table, and no bound is ever taken for another."""

from __future__ import annotations

import click
import numpy as np
import pytest

from macer_serve.cli.predict import command as predict
from macer_serve.errors import ParameterError
from macer_serve.serving.settings import ModelSettings
from macer_serve.smoothing.bounds import BOUNDS
from macer_serve.smoothing.certificate import statement
from macer_serve.smoothing.certification import Certification, Claim
from macer_serve.smoothing.confidence import CONFIDENCE, Budget
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw


def certified(bound: str) -> tuple[Plan, Claim]:
    """The claim of 1,000 votes, all for class 0."""
    plan = Plan(n=1000, bound=bound)
    run = Certification(plan, classes=3, sigma=0.25)
    while isinstance(draw := run.wants(), Draw):
        run.add(draw, np.array([len(draw), 0, 0]))
    return plan, run.claim()


def test_a_new_bound_is_one_file_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BOUNDS, "cautious", "cautious_bound")
    plan, claim = certified("cautious")
    _, published = certified("one-sided")
    assert claim.class_id == 0
    assert claim.radius == pytest.approx(published.radius / 2, abs=2e-6)
    assert "changes the cautious smoothed classifier's class" in statement(claim, plan, "exact-lattice/1")
    assert Plan.from_json(plan.to_json()) == plan


def test_commands_and_deployments_take_the_bounds_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    (option,) = [o for o in predict.params if o.name == "bound"]
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(BOUNDS)
    monkeypatch.setitem(BOUNDS, "cautious", "cautious_bound")
    assert ModelSettings(checkpoint="bundled:cifar10", bound="cautious").plan().bound == "cautious"


def test_an_unknown_bound_is_refused_by_name() -> None:
    with pytest.raises(ParameterError, match="no bound 'cautious'; choose one of: one-sided, two-sided, soft"):
        Plan(bound="cautious")


@pytest.mark.parametrize("name", ["betting", "clopper_pearson", "binomial-test"])
def test_an_unknown_confidence_bound_never_passes_for_clopper_pearson(name: str) -> None:
    with pytest.raises(ParameterError, match=f"no confidence bound {name}"):
        Budget(100, {"mixture": 0.0008, name: 0.0002})


@pytest.mark.parametrize("n", [1, 99, 101])
def test_clopper_pearson_says_nothing_but_at_n(n: int) -> None:
    votes = np.array([n, 0])
    assert CONFIDENCE["clopper-pearson"].lower(votes, 0, 0.001, 100) is None
    assert CONFIDENCE["clopper-pearson"].upper(votes, [1], 0.001, 100) is None
    assert Budget(100, {"clopper-pearson": 0.001}).lower(votes, 0, sides=1) == 0.0
    assert Budget(100, {"clopper-pearson": 0.001}).upper(votes, [1], sides=1) == 1.0
