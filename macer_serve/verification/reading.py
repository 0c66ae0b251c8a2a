"""Reading certificates from outside. Any bytes give a `Certificate` or a `ParameterError`."""

from __future__ import annotations

import json
import math
from typing import Any

from macer_serve.errors import ParameterError
from macer_serve.smoothing.certificate import Certificate
from macer_serve.verification.findings import escaped

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 6  # an answer, its certificate, votes, a class, a pair: five


def read_certificate(data: bytes) -> tuple[Certificate, dict[str, Any] | None]:
    """Returns the certificate in a JSON document, and the answer of `POST /predict` around it, if there is one.

    Raises `ParameterError` for a document that is not UTF-8 or JSON, holds NaN or a repeated name, or is too large.
    """
    try:
        return _read(data)
    except ParameterError as error:
        raise ParameterError(escaped(str(error))) from None


def _read(data: bytes) -> tuple[Certificate, dict[str, Any] | None]:
    if len(data) > MAX_BYTES:
        raise ParameterError(f"not a certificate: more than {MAX_BYTES:,} bytes")
    try:
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object, parse_float=_number)
    except RecursionError:
        raise ParameterError("not a certificate: nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise ParameterError(f"not a certificate: {error}") from error
    _check(document)
    if isinstance(document, dict) and isinstance(document.get("certificate"), dict):
        return Certificate.from_json(document["certificate"]), document
    return Certificate.from_json(document), None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object. Raises `ParameterError` for a repeated name, which other readers would read differently."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ParameterError("not a certificate: a name is given twice in one object")
    return values


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ParameterError(f"not a certificate: {text[:20]} is out of range")
    return value


def _check(document: Any) -> None:
    """Raise `ParameterError` for values that are nested too deeply, and for numbers that no certificate holds."""
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif type(value) is int and abs(value) >= 2**53:
                raise ParameterError("not a certificate: a whole number beyond 2^53")
            elif isinstance(value, float) and not math.isfinite(value):  # NaN, Infinity: constants, not numbers
                raise ParameterError("not a certificate: NaN and Infinity are no JSON")
        if not inner:
            return
        level = inner
    raise ParameterError("not a certificate: nested too deeply")
