"""JSON documents of keys, read strictly."""

from __future__ import annotations

import json
from typing import Any

from macer_serve.errors import IssuerKeyError, first_line

MAX_BYTES = 2**18  # sixteen keys with their proofs take about 100 KB


def read_object(text: str | bytes) -> dict[str, Any]:
    """Returns the object in a JSON text.

    Raises `IssuerKeyError` for any other text, a repeated name, and a text of more than 256 KiB.
    """
    if len(text) > MAX_BYTES:
        raise IssuerKeyError(f"not a key set: more than {MAX_BYTES:,} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        document = json.loads(text, object_pairs_hook=unique_names)
    except RecursionError:
        raise IssuerKeyError("not a key set: nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, a repeated name, or an integer of thousands of digits
        raise IssuerKeyError(f"not a key set: {ascii(first_line(error))[1:-1]}") from None
    if not isinstance(document, dict):
        raise IssuerKeyError("not a key set: it must be a JSON object")
    return document


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object. Raises `ValueError` for a repeated name, which other readers would read differently."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return values
