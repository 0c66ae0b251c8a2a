"""Coarse answers in records: what follows is recomputed, each change is named, and a hidden group stays hidden."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from brightness import issuer
from checking import document_of, failed
from coarse_records import CONFIG, IMAGE, OTHER, PLANS, certificate

from macer_serve.evaluation.logs import Log, Row
from macer_serve.evaluation.summaries import summary
from macer_serve.serving.schemas import short_answer
from macer_serve.serving.settings import ModelSettings
from macer_serve.serving.withholding import withhold
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.hierarchy import Hierarchy
from macer_serve.smoothing.plan import Plan
from macer_serve.verification import Verdict, Verification, verify
from macer_serve.verification.short_claims import read_claim, verify_claim


def checked(record: dict[str, Any] | Certificate) -> Verification:
    record = record.to_json() if isinstance(record, Certificate) else record
    return verify(document_of(record), IMAGE, CONFIG, keys=issuer().keys)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.bound}, {p.kind}")
def test_a_coarse_answer_is_an_abstention_with_a_group(plan: Plan) -> None:
    c, hidden = certificate(plan), certificate(replace(plan, coarse=False))
    assert (c.level, c.group) == (1, "dim")
    assert (c.label, c.class_id, c.abstained, c.radius, c.upload_radius) == (None, None, True, 0.0, 0.0)
    assert c.group_radius > 0.0
    assert c.group_upload_radius > 0.0
    assert "over the groups dim and light says: dim. No class is certified." in c.statement
    assert (hidden.group, hidden.group_radius, hidden.group_upload_radius, hidden.label) == (None, 0.0, 0.0, None)
    assert (hidden.votes, hidden.policy, hidden.seed_proof) == (c.votes, c.policy, c.seed_proof)
    assert checked(c).verdict is checked(hidden).verdict is Verdict.CONSISTENT


@pytest.mark.parametrize(
    "changes",
    [
        {"group": "light"},
        {"group": None},
        {"level": 0},
        {"level": 2},
        {"group_radius": 0.9},
        {"group_upload_radius": 0.9},
        {"label": "dark", "class_id": 0, "abstained": False},
        {"abstained": False},
        {"radius": 0.1},
        {"group": None, "group_radius": 0.0, "group_upload_radius": 0.0},
    ],
)
def test_a_changed_group_is_named(changes: dict[str, Any]) -> None:
    report = checked({**certificate(PLANS[0]).to_json(), **changes})
    assert report.verdict is Verdict.CONTRADICTED  # signed by the issuer
    assert set(changes) & failed(report)


@pytest.mark.parametrize("hierarchy", [OTHER, None])
def test_another_hierarchy_is_another_policy(hierarchy: Hierarchy | None) -> None:
    c = certificate(PLANS[0])
    plan = {**c.plan, "hierarchy": None if hierarchy is None else hierarchy.to_json()}
    report = checked({**c.to_json(), "plan": plan})
    assert report.verdict.refutes
    assert "policy" in failed(report)


@pytest.mark.parametrize("reveal", ["bucket", "decision"])
def test_a_group_is_not_revealed_where_radii_are_not(reveal: Any, tmp_path: Path) -> None:
    """It would tell how the votes were split. The certificate that is kept says it, and supports the short claim."""
    c, grid = certificate(PLANS[0]), (0.1, 0.25)
    model = ModelSettings(checkpoint="x", radius=0.25, reveal=reveal, bucket_grid=grid)
    asked = 0.25 if reveal == "decision" else None
    claim, jws = withhold(c, issuer().sign(c.canonical()), model, asked, str(tmp_path), issuer())
    answer = short_answer(claim, jws).model_dump()
    assert (answer["label"], answer["abstained"], answer["radius"]) == (None, True, 0.0)
    assert "dim" not in json.dumps({**answer, "claim_jws": None}).replace(claim.withheld, "")
    document = read_claim(json.dumps(answer).encode())
    assert document is not None
    assert verify_claim(document, IMAGE, CONFIG, keys=issuer().keys).verdict is Verdict.WITHHELD
    evidence = next(tmp_path.iterdir()).read_bytes()
    whole = verify_claim(document, IMAGE, CONFIG, keys=issuer().keys, withheld=evidence)
    assert whole.verdict is Verdict.CONSISTENT


def test_coarse_logs_stand_beside_the_classes() -> None:
    coarse = Row(1, 0, -1, 0.0, False, 1.0, level=1, group="dim", group_radius=0.3, group_correct=True)
    figures = summary(Log((Row(0, 0, 0, 0.5, True, 1.0), coarse)), (0.0, 0.25))
    assert (figures.acr, figures.abstained, figures.coarse) == (0.25, 0.5, 0.5)
    assert [at.certified for at in figures.certified] == [1, 1]
    assert [at.certified for at in figures.coarse_certified] == [2, 2]
