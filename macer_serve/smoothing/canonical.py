"""JSON values with one text each, for signatures, digests and comparisons."""

from __future__ import annotations

import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Returns the one text of a JSON value: sorted names, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="surrogatepass")  # a record from outside may hold lone surrogates; it must not crash


def plain_numbers(value: Any) -> Any:
    """Returns the JSON value with whole numbers as integers at every depth, below 2^53 in size."""
    if isinstance(value, dict):
        return {k: plain_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain_numbers(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
