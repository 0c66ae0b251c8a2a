"""Plans on paper: what they say of looks and alpha, there and back, and which alterations are refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from plans import any_plan

from macer_serve.errors import ParameterError
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import SOFT_LEVELS, from_record, recorded


@settings(max_examples=100, deadline=None)
@given(any_plan())
def test_a_plan_is_read_back_as_it_was_written(plan: Plan) -> None:
    record = json.loads(json.dumps(plan.to_json()))
    again = Plan.from_json(record)
    assert again.to_json() == record
    assert (again.looks, again.alpha_split) == (plan.looks, plan.alpha_split)
    assert sum(record["alpha_split"].values()) == pytest.approx(plan.alpha, rel=1e-15)
    assert plan.looks[-1] == plan.n
    assert all(a < b for a, b in itertools.pairwise(plan.looks))


def alterations() -> list[Callable[[dict[str, Any]], object]]:
    return [
        lambda r: r["alpha_split"].update(mixture=r["alpha"]),
        lambda r: r["alpha_split"].update({"clopper-pearson": r["alpha"]}),
        lambda r: r["alpha_split"].pop("clopper-pearson"),
        lambda r: r["looks"].update(first=1),
        lambda r: r["looks"].update(growth=1.5),
        lambda r: r.update(kind="fixed"),
        lambda r: r.update(alpha=0.01),
        lambda r: r.update(n=2000.0),
        lambda r: r.update(n0=0),
        lambda r: r.update(bound="three-sided"),
        lambda r: r.update(beta=16.0),
        lambda r: r.update(radius=None),
        lambda r: r.update(tolerance=0.1),
        lambda r: r.update(mode="predict"),
        lambda r: r.update(more=1),
        lambda r: r.pop("looks"),
        lambda r: r.pop("n"),
    ]


@pytest.mark.parametrize("number", range(len(alterations())))
def test_an_altered_plan_is_refused(number: int) -> None:
    record = json.loads(json.dumps(Plan(n=2000, radius=0.25).to_json()))
    Plan.from_json(record)
    alterations()[number](record)
    with pytest.raises(ParameterError):
        Plan.from_json(record)


@pytest.mark.parametrize(
    "values",
    [
        {"radius": 0.1, "tolerance": 0.1}, {"radius": 0.0}, {"radius": -1.0}, {"radius": math.nan},
        {"radius": math.inf}, {"tolerance": 0.0}, {"tolerance": 1e9}, {"bound": "soft", "beta": 0.0}, {"bound": "both"},
        {"mode": "guess"},
        {"mode": "predict", "radius": 0.1}, {"mode": "predict", "tolerance": 0.1}, {"mode": "predict", "bound": "soft"},
    ],
)  # fmt: skip
def test_senseless_plans_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        Plan(**values)


@pytest.mark.parametrize("record", [None, 5, [], "plan", {}, {"n": 5}])
def test_what_is_no_plan_is_refused(record: Any) -> None:
    with pytest.raises(ParameterError):
        Plan.from_json(record)


def test_votes_are_read_back_as_they_were_recorded() -> None:
    generator = np.random.default_rng(0)
    soft = np.zeros((3, SOFT_LEVELS), np.int64)
    for row in soft:
        np.add.at(row, generator.integers(0, SOFT_LEVELS, 50), 1)
    for votes in (np.array([3, 0, 7]), soft):
        record = json.loads(json.dumps(recorded(votes)))
        np.testing.assert_array_equal(from_record(record, soft=votes.ndim == 2), votes)


@pytest.mark.parametrize(
    ("record", "soft"),
    [
        ([], False), ([1.0, 2], False), ([True, 2], False), ([-1, 2], False), (["1", 2], False), (None, False),
        ([[1, 2]], False), ([10**30], False), ([[[0, 5]], [[0, 4]]], True), ([[[1024, 5]]], True), ([[[-1, -5]]], True),
        ([[[0, 5.0]]], True), ([[[0]]], True), ([5], True), ([], True),
    ],
)  # fmt: skip
def test_what_are_no_votes_is_refused(record: Any, soft: bool) -> None:
    with pytest.raises(ParameterError, match="not votes"):
        from_record(record, soft=soft)
