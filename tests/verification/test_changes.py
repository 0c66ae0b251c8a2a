"""Each changed field of a certificate is named, and what merely looks lawful is found out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from brightness import config, issuer
from checking import Made, at, changed, check, document_of, failed

from macer_serve.errors import ParameterError
from macer_serve.verification import Verdict, verify


def nearby(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(0, value - 1)] if value else [1]
    if isinstance(value, float):
        return [value * 1.01 + 1e-3, value * 0.99 + 2e-3]
    if isinstance(value, str):
        return [value + "x", ""]
    return ["x"]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a record that is neither an object nor a list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


# Where a changed field is found out, if not under its own name.
NAMED = {"n": "votes"}
# A request may choose these, and another choice may prove the same by the same votes: the signature must tell.
SILENT = {("plan", name) for name in ("radius", "tolerance", "coarse")} | {("model", "name")}
# Another policy changes its digest.
POLICY = {("plan", name) for name in ("n", "beta")}


@pytest.mark.parametrize("kind", ["fixed", "abstained", "predict", "tolerance", "two-sided radius", "soft", "resized"])
def test_each_changed_field_is_named(kind: str, honest: Made) -> None:
    """By an issuer who signs the changed record. The engine's name alone needs the recount."""
    pixels, c = honest[kind]
    record = c.to_json()
    paths = [p for p in leaves(record) if p[0] not in ("engine", "version")]
    if kind == "soft":  # hundreds of levels
        paths = [p for p in paths if "votes" not in p[0]] + [p for p in paths if "votes" in p[0]][:9]
    looked = set()
    for path in paths:
        for value in nearby(at(record, path)):
            if value == at(record, path):
                continue
            try:
                report = check(changed(record, path, value), pixels)
            except ParameterError:
                continue
            top = path[0]
            level = kind == "soft" and "votes" in top and path[-1] == 0  # of a class that no bound rests on
            if not report.verdict.refutes and (path in SILENT or level):
                beside = document_of(record, beside=changed(record, path, value))
                assert verify(beside, pixels, config(), keys=issuer().keys).verdict.refutes
                continue
            assert report.verdict.refutes, (path, value)
            named = any(NAMED.get(top, top) in name for name in failed(report))
            instead = "policy" if path in POLICY else "stopped" if path in SILENT else ""
            assert named or instead in failed(report), (path, value, report.failed)
            if top == "radius":  # and no other: what follows from it is compared with what it should be
                assert failed(report) == {"radius"}
            looked.add(top)
    assert len(looked) >= 18


def test_votes_moved_between_classes_no_longer_prove_the_bound(honest: Made) -> None:
    pixels, c = honest["fixed"]
    votes = list(c.votes)
    votes[2], votes[0] = votes[2] + 20, votes[0] - 20
    report = check({**c.to_json(), "votes": votes}, pixels)
    assert failed(report) == {"p_lower", "p_upper", "radius", "upload_radius", "statement"}
    assert report.verdict is Verdict.CONTRADICTED


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("radius", {"stopped": "tolerance"}, "stopped"),
        ("radius", {"stopped": "n"}, "stopped"),
        ("fixed", {"stopped": "cap"}, "stopped"),
        ("fixed", {"stopped": "deadline"}, "stopped"),
        ("fixed", {"stopped": "tolerance"}, "stopped"),
        ("tolerance", {"stopped": "radius"}, "stopped"),
        ("fixed", {"proof_n": 10, "proof_votes": [0, 10, 0]}, "proof_n, proof_votes"),
        ("fixed", {"key_id": None}, "key_id"),
        ("fixed", {"seed_proof": None, "key_id": None}, "key_id"),
        ("deadline in the selection", {"n0": 1}, "n0, plan.n0"),
        ("fixed", {"selection_votes": [0, 0]}, "selection_votes"),
        ("fixed", {"selection_votes": [50, 0, 0]}, "class_id"),
        ("fixed", {"policy": "sha256:" + 64 * "0"}, "policy"),
    ],
)
def test_lawful_looking_changes(kind: str, changes: dict[str, Any], named: str, honest: Made) -> None:
    pixels, c = honest[kind]
    report = check({**c.to_json(), **changes}, pixels)
    assert named in failed(report)
    assert report.verdict.refutes
    # If the issuer did not sign the change, the signed copy tells.
    beside = document_of(c.to_json(), beside={**c.to_json(), **changes})
    report = verify(beside, pixels, config(), keys=issuer().keys)
    assert {name.partition(",")[0] for name in failed(report)} == set(changes)


@pytest.mark.parametrize("stopped", ["cap", "deadline", "futility", None])
def test_when_a_run_stopped_is_no_part_of_its_guarantee(stopped: str | None, honest: Made) -> None:
    pixels, c = honest["radius"]
    assert check({**c.to_json(), "stopped": stopped}, pixels).verdict is Verdict.CONSISTENT
