"""Certification logs on disk: one line an image, separated by tabs.

    # dataset: cifar10                      settings of the run: our logs only
    # sigma: 0.25
    idx  label  predict  radius  correct  time            p_lower      n       count_a  top
    0    3      3        0.502113  1      0:00:00.412903  0.977683112  100000  97912    3

The first six columns are those of Cohen et al. 2019, which the field's other logs share. `predict` is -1 for an
abstention, `time` is `[D days, ]H:MM:SS[.ffffff]` (plain seconds are read too). Published logs print radii with
three significant digits, rounded to nearest, so that some exceed what was certified; `Log.radius_decimals` tells.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal
from io import FileIO
from pathlib import Path
from typing import Any, Self

from macer_serve.errors import LogError, ParameterError
from macer_serve.locks import HeldError, lock

COHEN_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
OUR_COLUMNS = (*COHEN_COLUMNS, "p_lower", "n", "count_a", "top")
ABSTAINED = -1

_GZIP_MAGIC = b"\x1f\x8b"
_SETTING = re.compile(r"#\s*([^:]*[^:\s])\s*:(.*)")
_TIME = re.compile(r"(?:([0-9]{1,5}) days?, )?([0-9]{1,7}):([0-5][0-9]):([0-5][0-9])(?:\.([0-9]{1,6}))?")


@dataclass(frozen=True, slots=True)
class Row:
    """One image's certificate. `predict` is -1 and `radius` 0 where it abstained; `radius` is rounded down.

    `top` is the selected class, `count_a` its share of the `n` estimation votes, `p_lower` the lower bound of
    its probability; foreign logs lack them. Raises `ParameterError` for values that contradict one another.
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

    def __post_init__(self) -> None:
        least = min(self.idx, self.label, self.predict + 1, self.n or 0, self.count_a or 0, self.top or 0)
        rules = (
            (least >= 0, "idx, label, n, count_a and top must be 0 or more, predict -1 or more"),
            (0.0 <= self.radius < math.inf, "radius must be a finite number, 0 or more"),
            (self.predict != ABSTAINED or self.radius == 0.0, "an abstention (predict -1) has radius 0"),
            (self.correct == (self.predict == self.label), "correct must tell whether predict is label"),
            (0.0 <= self.seconds <= 1e9, "time must lie in [0, 1e9] seconds"),
            (self.p_lower is None or 0.0 <= self.p_lower <= 1.0, "p_lower must lie in [0, 1]"),
            (None in (self.n, self.count_a) or (self.count_a or 0) <= (self.n or 0), "count_a must be at most n"),
            (self.top is None or self.predict in (ABSTAINED, self.top), "predict must be -1 or top"),
        )
        for holds, rule in rules:
            if not holds:
                raise ParameterError(f"{rule}: {self}")


@dataclass(frozen=True, slots=True)
class Log:
    """A log's rows in their order, and its settings (empty for foreign logs).

    `radius_decimals` is the fewest decimals with which a radius above 0 was printed; None where there is none.
    """

    rows: tuple[Row, ...]
    header: dict[str, str] = field(default_factory=dict)
    name: str = "log"
    radius_decimals: int | None = None


def read_log(path: str | Path) -> Log:
    """The log at `path`, plain or gzip, Cohen's or ours; `LogError` names the file and line of what is wrong.

    An unterminated last line of one of our logs is left out: it is still being written, or never will be.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise LogError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return _parse(data, str(path))


def _parse(data: bytes, name: str) -> Log:
    complete, _, tail = data.rpartition(b"\n")
    last = tail.decode(errors="replace")
    try:
        # Not splitlines: it also splits at characters that a setting may contain.
        lines = [line.removesuffix("\r") for line in complete.decode().split("\n")] if complete else []
    except UnicodeDecodeError as error:
        raise LogError(f"{name}: not a certification log, nor any other text") from error
    settings, columns, first = _head([*lines, last], name)
    if columns != OUR_COLUMNS:
        lines.append(last)  # a foreign log may lack its last newline; in ours, cut short, top 12 would read as 1
    while lines and not lines[-1].strip():
        lines.pop()
    rows: dict[int, Row] = {}
    decimals: list[int] = []
    for number, line in enumerate(lines[first:], start=first + 1):
        cells = line.split("\t")
        try:
            row = _row(columns, cells)
        except ValueError as error:
            raise LogError(f"{name}, line {number}: {error}") from error
        if row.idx in rows:
            raise LogError(f"{name}, line {number}: image {row.idx} is in the log already")
        rows[row.idx] = row
        if row.radius > 0.0:
            decimals.append(-int(Decimal(cells[COHEN_COLUMNS.index("radius")]).as_tuple().exponent))
    return Log(tuple(rows.values()), settings, name, min(decimals, default=None))


def _head(lines: list[str], name: str) -> tuple[dict[str, str], tuple[str, ...], int]:
    """The settings, the columns, and the index of the first row's line."""
    settings: dict[str, str] = {}
    wanted = f"the columns {' '.join(COHEN_COLUMNS)}, separated by tabs"
    for index, line in enumerate(lines):
        if not line.startswith("#"):
            columns = tuple(line.split("\t"))
            if columns[: len(COHEN_COLUMNS)] == COHEN_COLUMNS and len(set(columns)) == len(columns):
                return settings, columns, index + 1
            raise LogError(f"{name}, line {index + 1}: not a certification log: expected {wanted}, found {line[:60]!r}")
        match = _SETTING.fullmatch(line)
        if match is None or match[1] in settings:
            raise LogError(f"{name}, line {index + 1}: expected '# key: value' with a new key, found {line[:60]!r}")
        settings[match[1]] = match[2].strip()
    raise LogError(f"{name}: not a certification log: expected {wanted}, found none")


def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text)
    if match is None:
        return float(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()[:4])
    microseconds = int((match[5] or "").ljust(6, "0"))
    # One division of an integer: the float that prints back as the same time.
    return ((((days * 24 + hours) * 60 + minutes) * 60 + seconds) * 1_000_000 + microseconds) / 1e6


_Kind = tuple[re.Pattern[str], Callable[[str], Any], str]
_DIGITS = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_INTEGER: _Kind = re.compile("-?[0-9]{1,18}"), int, "an integer"
_NUMBER: _Kind = re.compile(_DIGITS), float, "a finite number, 0 or more"
_FLAG: _Kind = re.compile("[01]"), "1".__eq__, "0 or 1"
_DURATION: _Kind = re.compile(f"{_TIME.pattern}|{_DIGITS}"), _seconds, "[D days, ]H:MM:SS[.ffffff] or seconds"
_KINDS = dict.fromkeys(("idx", "label", "predict", "n", "count_a", "top"), _INTEGER)
_KINDS |= {"radius": _NUMBER, "correct": _FLAG, "time": _DURATION, "p_lower": _NUMBER}


def _row(columns: tuple[str, ...], cells: list[str]) -> Row:
    """The row of a line; other columns than ours and Cohen's are skipped. Raises `ValueError`."""
    if len(cells) != len(columns):
        raise ValueError(f"expected {len(columns)} fields separated by tabs, found {len(cells)}")
    values: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        if column in COHEN_COLUMNS or (column in OUR_COLUMNS and cell):
            pattern, convert, what = _KINDS[column]
            if not pattern.fullmatch(cell):
                raise ValueError(f"{column} must be {what}, not {cell!r}")
            values[column] = convert(cell)
    return Row(seconds=values.pop("time"), **values)


def _format(row: Row) -> str:
    """The row's line; raises `ParameterError` for a radius that printing would round, hence possibly up."""
    radius = format(abs(row.radius), ".6f")  # abs: -0.0 would print its sign
    if float(radius) != row.radius:
        raise ParameterError(f"a radius must be rounded down to 6 decimals before it is logged, not {row.radius!r}")
    p_lower = "" if row.p_lower is None else f"{Decimal(abs(row.p_lower)).quantize(Decimal('1e-9'), ROUND_FLOOR):f}"
    cohen = (row.idx, row.label, row.predict, radius, int(row.correct), timedelta(seconds=row.seconds))
    counts = ("" if count is None else count for count in (row.n, row.count_a, row.top))
    return "\t".join(map(str, (*cohen, p_lower, *counts))) + "\n"


def _format_head(settings: Mapping[str, str]) -> str:
    lines = []
    for key, value in settings.items():
        line = f"# {key}: {value}"
        match = _SETTING.fullmatch(line)
        if match is None or "\n" in line or (match[1], match[2].strip()) != (key, value):
            raise ParameterError(f"setting {key!r}: {value!r} cannot be written on one line and read back")
        lines.append(line)
    return "\n".join((*lines, "\t".join(OUR_COLUMNS))) + "\n"


class LogWriter:
    """A log open for appending, one flushed line an image, so that a run can be killed and continued at any time.

    `done` and `rows` are what the log held when it was opened.
    """

    def __init__(self, path: Path, file: FileIO, rows: tuple[Row, ...]) -> None:
        self.path = path
        self.rows = rows
        self.done = frozenset(row.idx for row in rows)
        self._file = file
        self._written = set(self.done)

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, str]) -> Self:
        """A writer that starts the log at `path`, or continues it after its last complete line.

        Raises `LogError` where the file is no log of ours, has other settings, or is being written by another.
        """
        path = Path(path)
        head = _format_head(settings).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as opened:
                # Unbuffered: a write is done or raises there and then, never later in close().
                file = opened.enter_context(path.open("a+b", buffering=0))
                _lock(file, path)
                file.seek(0)
                data = file.read()
                rows: tuple[Row, ...] = ()
                if len(data) < len(head) and head.startswith(data):  # new, or killed before its first row
                    file.truncate(0)
                    _append(file, head)
                else:
                    rows = _continued(data, path, settings)
                    file.truncate(data.rfind(b"\n") + 1)
                opened.pop_all()
        except OSError as error:
            raise LogError(f"{path}: {error.strerror or error}") from error
        return cls(path, file, rows)

    def write(self, row: Row) -> None:
        """Append the row, and return once the disk has it; raises `LogError` for an image that is there already."""
        if row.idx in self._written:
            raise LogError(f"{self.path}: image {row.idx} is in the log already")
        try:
            _append(self._file, _format(row).encode())
        except OSError as error:
            self.close()  # another row must not be glued to what may be half a line
            raise LogError(f"{self.path}: {error.strerror or error}") from error
        self._written.add(row.idx)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _append(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def _lock(file: FileIO, path: Path) -> None:
    """Two runs on one log would write images twice, and spoil it."""
    try:
        lock(file)
    except HeldError as holder:
        raise LogError(f"{path} is being written by {holder}; wait for it, or use another --out") from None


def _continued(data: bytes, path: Path, settings: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of a log that may be continued with these settings."""
    if data.startswith(_GZIP_MAGIC):
        raise LogError(f"{path} is compressed; decompress it to continue it, or use another --out")
    log = _parse(data, str(path))
    differing = [
        f"{key} ({log.header.get(key, 'absent')} there, {settings.get(key, 'absent')} now)"
        for key in dict.fromkeys((*log.header, *settings))
        if log.header.get(key) != settings.get(key)
    ]
    if differing:
        raise LogError(f"{path} was written with other settings: {', '.join(differing)}; use another --out")
    if "\t".join(OUR_COLUMNS).encode() not in data.split(b"\n"):
        raise LogError(f"{path} has other columns than {' '.join(OUR_COLUMNS)}; use another --out")
    return log.rows
