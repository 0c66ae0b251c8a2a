"""Reading certificates from outside. Any bytes give a `Document` or a `ParameterError`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from macer_serve.errors import ParameterError
from macer_serve.issuing.documents import unique_names
from macer_serve.issuing.jws import take_apart
from macer_serve.smoothing.canonical import canonical_json, plain_numbers
from macer_serve.smoothing.certificate import Certificate
from macer_serve.verification.findings import escaped

MAX_BYTES = 16 * 2**20
_JWS = re.compile(rb"\s*[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\s*")
MAX_DEPTH = 6  # an answer, its certificate, votes, a class, a pair: five


@dataclass(frozen=True, slots=True)
class Document:
    """A certificate with what came around it: its signed form, and the answer of `POST /predict`, if they are there.

    `beside` are the fields in which an unsigned copy of the certificate differs from the signed one.
    """

    certificate: Certificate
    jws: str | None = None
    answer: dict[str, Any] | None = None
    beside: tuple[str, ...] = ()


def read_document(data: bytes) -> Document:
    """Returns the certificate in a document: an answer of `POST /predict`, a bare record, or a JWS.

    If there is a JWS, only its payload counts. Raises `ParameterError` for a document that is not UTF-8, JSON or a
    JWS, holds NaN or a repeated name, or is too large.
    """
    try:
        return _read(data)
    except ParameterError as error:
        raise ParameterError(escaped(str(error))) from None


def _read(data: bytes) -> Document:
    if len(data) > MAX_BYTES:
        raise ParameterError(f"not a certificate: more than {MAX_BYTES:,} bytes")
    if (text := jws_in(data)) is not None:
        return Document(_signed(text), text)
    document = json_of(data)
    if not isinstance(document, dict) or not isinstance(document.get("certificate"), dict):
        return Document(Certificate.from_json(document))
    jws = document.get("certificate_jws")
    if jws is None:
        return Document(Certificate.from_json(document["certificate"]), answer=document)
    if not isinstance(jws, str):
        raise ParameterError("not a certificate: certificate_jws must be text")
    signed, copy = _signed(jws), document["certificate"]
    record = plain_numbers(signed.to_json())
    names = sorted({*record, *copy})
    beside = tuple(k for k in names if k not in copy or k not in record or not same(copy[k], record[k]))
    return Document(signed, jws, document, beside)


def same(one: Any, other: Any) -> bool:
    """Returns whether two JSON values are the same: true is not 1, but 1.0 is."""
    return canonical_json(plain_numbers(one)) == canonical_json(plain_numbers(other))


def jws_in(data: bytes) -> str | None:
    """Returns the JWS that a document is; None if it is something else."""
    return data.strip().decode() if _JWS.fullmatch(data) else None


def _signed(jws: str) -> Certificate:
    return Certificate.from_json(json_of(take_apart(jws).payload, "utf-8"))


def json_of(data: bytes, encoding: str = "utf-8-sig") -> Any:
    """Returns the JSON values of a text. Raises `ParameterError` for NaN, repeated names and depth."""
    try:
        document = json.loads(data.decode(encoding), object_pairs_hook=unique_names, parse_float=_number)
    except RecursionError:
        raise ParameterError("not a certificate: nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, a repeated name, or an integer of thousands of digits
        raise ParameterError(f"not a certificate: {error}") from error
    _check(document)
    return document


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is out of range")
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
