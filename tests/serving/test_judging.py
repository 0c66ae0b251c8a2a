"""The judge of the mixed load sees what must not come back from a server. No server is needed for that."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving.conftest import ROOT

IMAGE = Path("ship.png")
CERTIFICATE = {"label": "ship", "radius": 0.25, "abstained": False, "stopped": "radius", "n": 500}
PROBLEM, JSON, STREAM = "application/problem+json", "application/json", "text/event-stream"


def answer(**changes: Any) -> dict[str, Any]:
    """Returns an answer whose certificate has been changed, and what is copied from it, too."""
    certificate = {**CERTIFICATE, **changes}
    copied = {name: certificate[name] for name in ("label", "radius", "abstained", "stopped")}
    return {**copied, "certificate": certificate, "certificate_jws": "a.b.c"}


def stream(*events: tuple[str, dict[str, Any]]) -> str:
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)


# What the client did, status, content type, Retry-After, body; the second is what is wrong about it.
RIGHT: list[tuple[str, int, str, str | None, str]] = [
    ("certify", 200, JSON, None, json.dumps(answer())),
    ("certify", 200, JSON, None, json.dumps(answer(stopped="deadline", n=100))),  # counted again later
    ("certify", 429, PROBLEM, "3", "{}"),
    ("certify", 503, PROBLEM, "1", "{}"),
    ("hostile", 400, PROBLEM, None, "{}"),
    ("hostile", 429, PROBLEM, "1", "{}"),
    ("stream", 200, STREAM, None, stream(("progress", {"n": 1, "radius": 0.1}), ("result", answer()))),
    ("stream", 200, STREAM, None, stream(("error", {"status": 503}))),
]
WRONG: list[tuple[str, int, str, str | None, str]] = [
    ("certify", 200, JSON, None, json.dumps(answer(radius=0.5))),
    ("certify", 200, JSON, None, json.dumps(answer() | {"radius": 0.5})),
    ("certify", 200, JSON, None, json.dumps(answer() | {"certificate_jws": "a.b.d"})),
    ("certify", 429, PROBLEM, None, "{}"),
    ("certify", 503, PROBLEM, "0", "{}"),
    ("certify", 429, "text/plain", "1", "busy"),
    ("certify", 500, PROBLEM, None, "{}"),
    ("certify", 422, PROBLEM, None, "{}"),
    ("hostile", 200, JSON, None, json.dumps(answer())),
    ("hostile", 500, PROBLEM, None, "{}"),
    ("hostile", 400, "text/html", None, "<p>"),
    ("stream", 200, STREAM, None, stream(("progress", {"n": 1, "radius": 0.1}))),
    ("stream", 200, STREAM, None, stream(("result", answer(n=501)))),
    ("stream", 200, STREAM, None, stream(("error", {"status": 500}))),
    ("stream", 200, STREAM, None, stream(*[("progress", {"n": n, "radius": 0}) for n in (2, 1)], ("result", answer()))),
]
CASES = [(case, 0) for case in RIGHT] + [(case, 1) for case in WRONG]


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("judging")


def judged(judging: Any, case: tuple[str, int, str, str | None, str], killed: list[float]) -> list[str]:
    """Returns what the judge finds wrong about a response, if the ingress was killed at those times."""
    expected = {("default", IMAGE): {"certificate": CERTIFICATE, "jws": "a.b.c"}}
    judge = judging.Judge(expected, SimpleNamespace(ingress=killed))
    action, *response = case
    judge.judge(judging.Sent(action, action, "default", IMAGE, time.monotonic()), judging.Received(*response))
    assert sum(judge.outcomes[action].values()) == 1
    return judge.wrong  # type: ignore[no-any-return]


@pytest.mark.parametrize(("case", "faults"), CASES)
def test_the_judge_finds_what_is_wrong_and_nothing_else(
    judging: Any, case: tuple[str, int, str, str | None, str], faults: int
) -> None:
    assert len(judged(judging, case, [])) == faults


def test_only_the_end_of_the_ingress_excuses_a_500(judging: Any) -> None:
    now = time.monotonic()
    case = ("certify", 500, PROBLEM, None, "{}")
    assert not judged(judging, case, [now - 5])
    assert len(judged(judging, case, [now - 60])) == 1
    assert len(judged(judging, ("certify", 500, "text/plain", None, "lost"), [now - 5])) == 1
