"""Each changed field of a certificate is named, and what merely looks lawful is found out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from brightness import SECRET
from checking import Made, at, changed, check, failed

from macer_serve.errors import InconsistentError, ParameterError, VerificationError


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
# Another plan may prove the same by the same votes, or be about other soft votes: a mac or votes must tell.
SILENT = {("plan", name) for name in ("n", "radius", "tolerance", "beta")}


@pytest.mark.parametrize("kind", ["fixed", "abstained", "predict", "tolerance", "two-sided radius", "soft", "resized"])
def test_each_changed_field_is_named(kind: str, honest: Made) -> None:
    """Without the secret and without votes; the engine's name and the mac alone need more."""
    pixels, c = honest[kind]
    record = c.to_json()
    paths = [p for p in leaves(record) if p[0] not in ("engine", "mac", "version")]
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
            if report.error is None and (path in SILENT or level):
                assert failed(check(changed(record, path, value), pixels, secret=SECRET)) == {"mac"}
                continue
            assert isinstance(report.error, VerificationError), (path, value)
            named = any(NAMED.get(top, top) in name for name in failed(report))
            # Another plan may have stopped elsewhere.
            assert named or (path in SILENT and "stopped" in failed(report)), (path, value, report.failed)
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
    assert isinstance(report.error, InconsistentError)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("radius", {"stopped": "tolerance"}, "stopped"),
        ("radius", {"stopped": "futility"}, "stopped"),
        ("radius", {"stopped": None}, "stopped"),
        ("radius", {"stopped": "n"}, "stopped"),
        ("fixed", {"stopped": "cap"}, "stopped"),
        ("fixed", {"stopped": "deadline"}, "stopped"),
        ("tolerance capped", {"stopped": "deadline"}, "stopped"),  # 517 is no look
        ("tolerance deadline", {"stopped": "tolerance"}, "stopped"),
        ("fixed", {"mac": None}, "mac"),
        ("fixed", {"engine": "torch-cpu-fp32-t1-b300:0000000000000000"}, "mac"),
        ("tolerance", {"stopped": "cap"}, "mac"),  # lawful, but not what was issued
        ("deadline in the selection", {"n0": 1}, "n0, plan.n0"),
        ("fixed", {"selection_votes": [0, 0]}, "selection_votes"),
        ("fixed", {"selection_votes": [50, 0, 0]}, "class_id"),
    ],
)
def test_lawful_looking_changes(kind: str, changes: dict[str, Any], named: str, honest: Made) -> None:
    pixels, c = honest[kind]
    report = check({**c.to_json(), **changes}, pixels, secret=SECRET)
    assert named in failed(report)
    assert isinstance(report.error, InconsistentError)


def test_the_answer_around_a_certificate_must_say_what_it_says(honest: Made) -> None:
    pixels, c = honest["fixed"]
    record = c.to_json()
    answer = {k: record[k] for k in ("label", "class_id", "abstained", "radius", "upload_radius", "reason", "stopped")}
    answer |= {"certificate": record, "issued_at": "2026-01-01T00:00:00.000+00:00", "timing_ms": {"queue": 0.1}}
    assert check(answer, pixels).error is None
    assert failed(check({**answer, "radius": 0.9}, pixels)) == {"answer"}
    assert failed(check({**answer, "label": "dark"}, pixels)) == {"answer"}
