"""No honest record is refused: random plans, caps, deadlines and votes, from run to record and back."""

from __future__ import annotations

import os

import numpy as np
import pytest
from brightness import config, image, issuer
from checking import check

from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certification import Certification, Done
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import SOFT_LEVELS, Draw, Votes
from macer_serve.verification import Verdict

RUNS = int(os.environ.get("MACER_HONEST_RUNS", "400"))  # 20,000 were run once: results/honest-runs.txt
CLASSIFIER = SmoothedClassifier(config(), issuer=issuer())
IMAGE = image(130)
INPUT = CLASSIFIER.model_input(IMAGE)


def random_plan(dice: np.random.Generator) -> Plan:
    kind = dice.choice(["fixed", "radius", "tolerance", "predict"], p=[0.15, 0.35, 0.45, 0.05])
    n = int(np.exp(dice.uniform(0.0, np.log(3000))))
    settings = {"n0": int(dice.integers(1, 60)), "n": n, "alpha": float(10.0 ** dice.uniform(-6, -0.5))}
    if kind == "predict":
        return Plan(**settings, mode="predict")  # type: ignore[arg-type]
    settings["bound"] = str(dice.choice(["one-sided", "two-sided", "soft"], p=[0.5, 0.35, 0.15]))  # type: ignore[assignment]
    if kind != "fixed":
        settings[kind] = float(10.0 ** dice.uniform(-2, 0))
    return Plan(**settings)  # type: ignore[arg-type]


def votes_for(draw: Draw, law: np.ndarray, dice: np.random.Generator) -> Votes:
    winners = dice.choice(len(law), len(draw), p=law)
    if draw.beta is None:
        return np.bincount(winners, minlength=len(law))
    votes = np.zeros((len(law), SOFT_LEVELS), np.int64)
    for c in range(len(law)):
        np.add.at(votes[c], np.where(winners == c, SOFT_LEVELS - 1 - dice.integers(0, 300, len(draw)), 10 * c), 1)
    return votes


def honest_run(dice: np.random.Generator) -> Certification:
    """A run that ends at its plan, at a cap, at a deadline anywhere, or is shown while it is still running."""
    cap = int(dice.integers(1, 3000)) if dice.random() < 0.4 else None
    run = CLASSIFIER.certification(INPUT, random_plan(dice), cap=cap)
    law = dice.dirichlet(np.full(3, 10.0 ** dice.uniform(-1.5, 0.5)))
    until = int(dice.integers(0, 3000)) if dice.random() < 0.3 else 10**9
    while not isinstance(want := run.wants(int(dice.integers(1, 300))), Done):
        assert isinstance(want, Draw)
        if want.purpose == "estimation" and want.start >= until:
            if dice.random() < 0.7:
                run.stop("deadline")
            break
        run.add(want, votes_for(want, law, dice))
    return run


@pytest.mark.parametrize("part", range(4))
def test_honest_records_are_never_refused(part: int) -> None:
    dice = np.random.default_rng(part)
    for _ in range(RUNS // 4):
        run = honest_run(dice)
        proof = CLASSIFIER.seed_proof(INPUT, run.plan)
        c = CLASSIFIER.certificate(INPUT, run, proof, "torch-cpu-fp32-b256:0123456789abcdef")
        report = check(c, IMAGE)
        assert report.verdict is Verdict.CONSISTENT, (run.plan, report.reasons)
