"""Checks of certificates as an auditor makes them, and changed records."""

from __future__ import annotations

import copy
import json
from typing import Any

from brightness import config, issuer

from macer_serve.issuing import Issuer, KeySet
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.verification import Document, Verification, read_document, verify
from macer_serve.voters import Voter

FIXED = Plan(n0=50, n=2000)
SOFT: dict[str, Any] = {"bound": "soft", "beta": 0.05}


class Made(dict[str, tuple[Any, Certificate]]):
    """By name: an image and its certificate."""

    def __repr__(self) -> str:  # hypothesis shows arguments
        return "Made"


def document_of(
    record: dict[str, Any], *, by: Issuer | None = None, sign: bool = True, beside: dict[str, Any] | None = None
) -> Document:
    """Returns a record as a document that went through JSON, signed by an issuer, who may lie, or by nobody.

    `beside` is the unsigned copy, the record itself by default.
    """
    jws = (by or issuer()).sign(json.dumps(record).encode()) if sign else None
    return read_document(json.dumps({"certificate": beside or record, "certificate_jws": jws}).encode())


def check(
    c: Certificate | dict[str, Any],
    pixels: Any,
    voters: dict[str, Voter] | None = None,
    *,
    keys: KeySet | None = None,
    **document: Any,
) -> Verification:
    """Returns the report on a record, as an auditor with the issuer's public keys gets it."""
    record = c if isinstance(c, dict) else c.to_json()
    make = None if voters is None else voters.__getitem__
    return verify(document_of(record, **document), pixels, config(), keys=keys or issuer().keys, voter=make)


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
