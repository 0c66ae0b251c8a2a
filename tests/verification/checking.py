"""Checks of certificates as an auditor makes them, and changed records."""

from __future__ import annotations

import copy
import json
from typing import Any

from brightness import config

from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.verification import Verification, read_certificate, verify
from macer_serve.voters import Voter

SEED = bytes(16)
OTHER = bytes(range(1, 33))  # a secret that is not the issuer's
FIXED = Plan(n0=50, n=2000)
SOFT: dict[str, Any] = {"bound": "soft", "beta": 0.05}


class Made(dict[str, tuple[Any, Certificate]]):
    """By name: an image and its certificate."""

    def __repr__(self) -> str:  # hypothesis shows arguments
        return "Made"


def check(c: Certificate | dict[str, Any], pixels: Any, voters: dict[str, Voter] | None = None, **more: Any) -> Any:
    """The report on a record that has gone through JSON."""
    record = c if isinstance(c, dict) else c.to_json()
    certificate, answer = read_certificate(json.dumps(record).encode())
    make = None if voters is None else voters.__getitem__
    return verify(certificate, pixels, config(), answer=answer, voter=make, **{"seed": SEED, **more})


def lines(report: Verification) -> dict[str, str]:
    """Returns the outcome of every check by its name."""
    return {f.check: f.outcome for f in report.findings}


def failed(report: Verification) -> set[str]:
    """Returns the names of the checks that failed."""
    return {f.check for f in report.failed}


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Returns a copy of the record with another value at the path."""
    record = copy.deepcopy(record)
    at: Any = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return record


def at(record: Any, path: tuple[Any, ...]) -> Any:
    """Returns the value at the path of a record."""
    for key in path:
        record = record[key]
    return record
