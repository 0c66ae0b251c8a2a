"""Rows of logs: one image each, with their columns, and their text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal
from typing import Any

from macer_serve.errors import ParameterError

Columns = tuple[str, ...]

COHEN_COLUMNS: Columns = ("idx", "label", "predict", "radius", "correct", "time")
PREDICT_COLUMNS: Columns = ("idx", "label", "predict", "correct", "time")
EARLIER_COLUMNS: Columns = (*COHEN_COLUMNS, "p_lower", "n", "count_a", "top")  # of logs without input digests
OUR_COLUMNS: Columns = (*EARLIER_COLUMNS, "input_digest", "level", "group", "group_radius", "group_correct")
ABSTAINED = -1
UNDECODABLE = "undecodable"  # in place of a digest: the decoder refuses the image


@dataclass(frozen=True, slots=True)
class Row:
    """The answer for one image. An abstention has `predict` -1 and `radius` 0; `radius` is rounded down.

    `top` is the selected class and `count_a` its share of the `n` estimation votes. `p_lower` is the lower bound of its
    probability. `input_digest` is that of the model input, or `UNDECODABLE`. Logs from elsewhere lack these. Logs of
    PREDICT have no radius; it is 0 here. A coarse answer is an abstention with a `level`, the name of a certified
    `group`, its radius, and whether it holds the label. Raises `ParameterError` for values that contradict each other.
    """

    idx: int
    label: int
    predict: int
    radius: float
    correct: bool
    seconds: float
    p_lower: float | None = None
    n: int | None = None
    count_a: int | None = None
    top: int | None = None
    input_digest: str | None = None
    level: int | None = None
    group: str | None = None
    group_radius: float | None = None
    group_correct: bool | None = None

    def __post_init__(self) -> None:
        least = min(self.idx, self.label, self.predict + 1, self.n or 0, self.count_a or 0, self.top or 0)
        rules = (
            (least >= 0, "idx, label, n, count_a and top must be 0 or more, predict -1 or more"),
            (0.0 <= self.radius < math.inf, "radius must be a finite number, 0 or more"),
            (self.predict != ABSTAINED or self.radius == 0.0, "an abstention (predict -1) has radius 0"),
            (self.correct == (self.predict == self.label), "correct must say whether predict equals label"),
            (0.0 <= self.seconds <= 1e9, "time must lie in [0, 1e9] seconds"),
            (self.p_lower is None or 0.0 <= self.p_lower <= 1.0, "p_lower must lie in [0, 1]"),
            (None in (self.n, self.count_a) or (self.count_a or 0) <= (self.n or 0), "count_a must be at most n"),
            (self.top is None or self.predict in (ABSTAINED, self.top), "predict must be -1 or top"),
            (self.input_digest != UNDECODABLE or self.predict == ABSTAINED, "an undecodable image is an abstention"),
            (self.group is None or self.predict == ABSTAINED, "a coarse answer is an abstention (predict -1)"),
            (
                (self.group is None) == (self.group_radius is None) == (self.group_correct is None),
                "group, group_radius and group_correct belong together",
            ),
        )
        for holds, rule in rules:
            if not holds:
                raise ParameterError(f"{rule}: {self}")


def row_of(columns: Columns, cells: list[str]) -> Row:
    """Returns the row of a line. Columns with other names than ours and Cohen's are skipped.

    Raises `ValueError` for another number of cells than of columns, and for values of another form.
    """
    if len(cells) != len(columns):
        raise ValueError(f"expected {len(columns)} fields separated by tabs, found {len(cells)}")
    values = {"radius": 0.0, **_values(columns, cells)}
    return Row(seconds=values.pop("time"), **values)


def is_half_line(columns: Columns, cells: list[str]) -> bool:
    """Returns whether the cells may be a line that was cut: all but the last are values, and more was to come."""
    *before, last = cells
    if not _are_values(columns, before):
        return False
    return len(cells) < len(columns) or (len(cells) == len(columns) and not _are_values(columns[-1:], [last]))


def _are_values(columns: Columns, cells: list[str]) -> bool:
    try:
        _values(columns, cells)
    except ValueError:
        return False
    return True


def _values(columns: Columns, cells: list[str]) -> dict[str, Any]:
    """Returns the values of the cells by column. Raises `ValueError` for a cell of another form than its column's."""
    values = {}
    for column, cell in zip(columns, cells, strict=False):
        if column in COHEN_COLUMNS or (column in OUR_COLUMNS and cell):
            pattern, convert, what = _KINDS[column]
            if not pattern.fullmatch(cell):
                raise ValueError(f"{column} must be {what}, not {cell[:60]!r}")
            values[column] = convert(cell)
    return values


_TIME = re.compile(r"(?:([0-9]{1,5}) days?, )?([0-9]{1,7}):([0-5][0-9]):([0-5][0-9])(?:\.([0-9]{1,6}))?")


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        return float(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()[:4])
    microseconds = int((match[5] or "").ljust(6, "0"))
    # One division of an integer: the float that prints as the same time again.
    return ((((days * 24 + hours) * 60 + minutes) * 60 + seconds) * 1_000_000 + microseconds) / 1e6


_Kind = tuple[re.Pattern[str], Callable[[str], Any], str]
_DIGITS = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_INTEGER: _Kind = re.compile("-?[0-9]{1,18}"), int, "an integer"
_NUMBER: _Kind = re.compile(_DIGITS), float, "a finite number, 0 or more"
_FLAG: _Kind = re.compile("[01]"), "1".__eq__, "0 or 1"
_DURATION: _Kind = re.compile(f"{_TIME.pattern}|{_DIGITS}"), _seconds, "[D days, ]H:MM:SS[.ffffff] or seconds"
_KINDS = dict.fromkeys(("idx", "label", "predict", "n", "count_a", "top"), _INTEGER)
_KINDS |= {"radius": _NUMBER, "correct": _FLAG, "time": _DURATION, "p_lower": _NUMBER}
_KINDS["input_digest"] = re.compile(f"sha256:[0-9a-f]{{64}}|{UNDECODABLE}"), str, f"a digest or {UNDECODABLE!r}"
_KINDS |= {"level": _INTEGER, "group_radius": _NUMBER, "group_correct": _FLAG}
_KINDS["group"] = re.compile(r"[^\t\n]+"), str, "a name"


def line_of(row: Row) -> str:
    """Returns the row's line. Raises `ParameterError` for a radius that printing would round, possibly up."""
    radius = format(abs(row.radius), ".6f")  # abs: -0.0 would print its sign
    if float(radius) != row.radius:
        raise ParameterError(f"a radius must be rounded down to 6 decimals before it is logged, not {row.radius!r}")
    p_lower = "" if row.p_lower is None else f"{Decimal(abs(row.p_lower)).quantize(Decimal('1e-9'), ROUND_FLOOR):f}"
    cohen = (row.idx, row.label, row.predict, radius, int(row.correct), timedelta(seconds=row.seconds))
    group_radius = None if row.group_radius is None else format(abs(row.group_radius), ".6f")
    if group_radius is not None and float(group_radius) != row.group_radius:
        raise ParameterError(f"a radius must be rounded down to 6 decimals, not {row.group_radius!r}")
    group_correct = None if row.group_correct is None else int(row.group_correct)
    ours = (row.n, row.count_a, row.top, row.input_digest, row.level, row.group, group_radius, group_correct)
    return "\t".join(map(str, (*cohen, p_lower, *("" if value is None else value for value in ours)))) + "\n"
