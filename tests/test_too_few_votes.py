"""Fewer votes than could ever prove anything: said at once, and said in the certificate, by every bound and plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from macer_serve.cli import main
from macer_serve.smoothing.binomial import smallest
from macer_serve.smoothing.certificate import reason
from macer_serve.smoothing.certification import Certification, Claim
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import too_few_votes
from macer_serve.smoothing.votes import SOFT_LEVELS, Draw

SHIP = Path(__file__).parent / "images" / "0001-ship.png"
CLASSES = ("cat", "dog", "ship")
PLANS: list[tuple[dict[str, Any], int]] = [  # a plan at alpha 0.001, and the fewest votes with which it can answer
    ({}, 10),
    ({"bound": "two-sided"}, 11),
    ({"bound": "soft"}, 14),
    ({"mode": "predict"}, 11),
    ({"radius": 0.01}, 13),
    ({"radius": 3.0}, 13),
    ({"tolerance": 0.001}, 13),
    ({"tolerance": 0.5}, 13),
    ({"radius": 0.01, "bound": "two-sided"}, 14),
    ({"tolerance": 0.1, "bound": "two-sided"}, 14),
    ({"radius": 0.01, "bound": "soft"}, 14),
    ({"tolerance": 0.1, "bound": "soft"}, 14),
    ({"alpha": 0.05}, 5),
    ({"alpha": 1e-9}, 30),
    ({"alpha": 1e-6, "tolerance": 0.1}, 23),
]


def unanimous(plan: Plan) -> Claim:
    """Returns the claim of a run all of whose votes are for the ship."""
    run = Certification(plan, classes=3, sigma=0.25)
    while isinstance(draw := run.wants(), Draw):
        votes = np.zeros((3, SOFT_LEVELS) if plan.soft else 3, dtype=np.int64)
        if plan.soft:
            votes[:2, 0] = votes[2, -1] = len(draw)
        else:
            votes[2] = len(draw)
        run.add(draw, votes)
    return run.claim()


@pytest.mark.parametrize(("options", "fewest"), PLANS)
def test_the_fewest_votes_of_a_plan(options: dict[str, Any], fewest: int) -> None:
    """Real runs decide: unanimous votes give an answer from the fewest votes on, and never before."""
    for n in range(1, fewest + 6):
        plan = Plan(n=n, **options)
        claim = unanimous(plan)
        words = too_few_votes(plan)
        if n < fewest:
            assert claim.abstained
            assert words is not None
            assert words.endswith(f"nothing at alpha {plan.alpha:g}: at least {fewest} votes are needed")
            assert reason(claim, plan, CLASSES) == words
        else:
            assert words is None
            assert claim.class_id == 2


def test_the_words() -> None:
    assert too_few_votes(Plan(n=9)) == (
        "9 votes, even unanimous, prove nothing at alpha 0.001: at least 10 votes are needed"
    )
    assert too_few_votes(Plan(n=1)) == "1 vote proves nothing at alpha 0.001: at least 10 votes are needed"
    assert too_few_votes(Plan(n=30, alpha=1e-12)) == (
        "30 votes, even unanimous, prove nothing at alpha 1e-12: at least 40 votes are needed"
    )


@pytest.mark.parametrize("stopped", ["deadline", "cap", "tolerance", "futility", "n"])
def test_too_few_votes_come_before_every_other_reason(stopped: Any) -> None:
    votes = (0, 0, 9)
    claim = Claim(
        None, 0.0, 0.0, 1.0, top_class=2, votes=votes, n=9, proof_votes=votes, proof_n=9, selection_votes=(0, 0, 100),
        stopped=stopped,
    )  # fmt: skip
    told = reason(claim, Plan(n=12, tolerance=0.1), CLASSES)
    assert told == "12 votes, even unanimous, prove nothing at alpha 0.001: at least 13 votes are needed"


def test_split_votes_are_still_called_split() -> None:
    claim = Claim(
        None, 0.0, 0.1, 0.9, top_class=2, votes=(5, 0, 5), n=10, proof_votes=(5, 0, 5), proof_n=10,
        selection_votes=(0, 0, 100), stopped="n",
    )  # fmt: skip
    assert str(reason(claim, Plan(n=10), CLASSES)).startswith("votes were split: cat 50.0 %, ship 50.0 %")


@pytest.mark.parametrize("least", [1, 2, 3, 7, 8, 9, 1000])
def test_smallest(least: int) -> None:
    assert smallest(lambda n: n >= least) == least
    assert smallest(lambda n: n >= least, most=8) == min(least, 8)


def macer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("options", "fewest"),
    [
        (["--n", 9], 10),
        (["--n", 1], 10),
        (["--n", 10, "--bound", "two-sided"], 11),
        (["--n", 13, "--bound", "soft"], 14),
        (["--n", 10, "--mode", "predict"], 11),
        (["--n", 12, "--radius", 0.1], 13),
        (["--n", 12, "--tolerance", 0.1], 13),
        (["--n", 13, "--radius", 0.1, "--bound", "two-sided"], 14),
        (["--n", 22, "--alpha", 1e-6, "--tolerance", 0.4], 23),
        (["--n", 19, "--alpha", 1e-6], 20),
    ],
)
def test_predict_warns_at_once_and_says_why(options: list[object], fewest: int) -> None:
    result = macer("predict", SHIP, "--engine", "torch", "--device", "cpu", "--no-compile", "--json", *options)
    assert result.exit_code == 0, result.output
    assert f"WARNING: every answer will be an abstention. {options[1]} vote" in result.stderr
    assert f"at least {fewest} votes are needed (--n)" in result.stderr
    certificate = json.loads(result.stdout)["certificate"]
    assert certificate["abstained"]
    assert certificate["reason"].endswith(f"at least {fewest} votes are needed")


def test_the_warning_comes_before_the_image_is_read() -> None:
    result = macer("predict", "no-such-file.png", "--n", 9)
    assert result.exit_code == 8
    assert result.stderr.startswith("WARNING: every answer will be an abstention. 9 votes, even unanimous")


@pytest.mark.parametrize("options", [["--n", 10], ["--n", 13, "--radius", 0.1], ["--n", 11, "--mode", "predict"]])
def test_no_warning_if_the_votes_may_suffice(options: list[object]) -> None:
    assert "WARNING" not in macer("predict", "no-such-file.png", *options).stderr


@pytest.mark.parametrize("options", [["--n", 9], ["--n", 10, "--bound", "two-sided"], ["--n", 12, "--tolerance", 0.1]])
def test_certify_warns_at_once(options: list[object], tmp_path: Path) -> None:
    """Before the data set is looked for."""
    out = tmp_path / "log.tsv"
    result = macer("certify", "bundled:cifar10", "--dataset", "cifar10", "--data-dir", tmp_path, "--out", out, *options)
    assert result.exit_code == 4
    assert result.stderr.startswith(f"WARNING: every answer will be an abstention. {options[1]} votes, even unanimous")
