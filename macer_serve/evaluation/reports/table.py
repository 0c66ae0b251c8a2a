"""A table before it has a format: what people read, and the same as values for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLUS_MINUS = "+/-"  # formats that have the sign write it as one
NOT_KNOWN = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` of text below `titles`, and the `records` that programs read, with names and full precision.

    The columns numbered in `left` are words, aligned to the left. `best` are the (row, column) of the figures that win
    a comparison. `notes` explain the table, one sentence or two each.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    records: Sequence[Mapping[str, Any]]
    left: frozenset[int] = frozenset()
    best: frozenset[tuple[int, int]] = frozenset()
    notes: Sequence[str] = ()
