"""Reading logs: ours, those of earlier versions, and those published with papers (Cohen's CERTIFY and PREDICT)."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from macer_serve.errors import LogError
from macer_serve.evaluation.logs.rows import (
    COHEN_COLUMNS,
    EARLIER_COLUMNS,
    OUR_COLUMNS,
    PREDICT_COLUMNS,
    UNDECODABLE,
    Columns,
    Row,
    is_half_line,
    row_of,
)
from macer_serve.evaluation.logs.settings import Settings, read_settings

GZIP_MAGIC = b"\x1f\x8b"
_SETTING = re.compile(r"#\s*([^:]*[^:\s])\s*:(.*)")  # in the first lines of logs of earlier versions
_WANTED = f"the columns {' '.join(COHEN_COLUMNS)}, separated by tabs, or the same without radius"


@dataclass(frozen=True, slots=True)
class Log:
    """A log's rows in their order, and its settings (empty for logs from elsewhere).

    `radius_decimals` is the fewest decimals with which a radius above 0 was printed; None if there is no such radius.
    `has_radii` is False for logs of PREDICT, which certify no radius. `notes` say what was left out, one sentence each.
    """

    rows: tuple[Row, ...]
    settings: Settings = field(default_factory=dict)
    name: str = "log"
    radius_decimals: int | None = None
    has_radii: bool = True
    notes: tuple[str, ...] = ()


def read_log(path: str | Path) -> Log:
    """Returns the log at `path`, plain or compressed by gzip, with the settings from the file beside it.

    A last line that is not complete is left out, and `Log.notes` says so. Raises `LogError` with the file and the line
    of anything else that is not as expected.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise LogError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    log, columns = parse(data, str(path))
    if columns[: len(EARLIER_COLUMNS)] != EARLIER_COLUMNS or log.settings:
        return log
    path = Path(path)
    settings = read_settings(path)
    if settings is None and path.suffix == ".gz":  # compressed after it was written
        settings = read_settings(path.with_suffix(""))
    return Log(log.rows, settings or {}, log.name, log.radius_decimals, log.has_radii, log.notes)


def parse(data: bytes, name: str) -> tuple[Log, Columns]:
    """Returns the log with that text, and its columns. Raises `LogError`."""
    lines = [line.removesuffix("\r") for line in _text(data, name).split("\n")]  # splitlines splits elsewhere, too
    settings, columns, first = _head(lines, name)
    complete = len(lines) - 1  # the last line has no newline; it is empty if the file ends with one
    while len(lines) > first and not lines[-1].strip(" \t\0"):
        lines.pop()
    rows: dict[int, Row] = {}
    decimals: list[int] = []
    notes: list[str] = []
    for index, line in enumerate(lines[first:], start=first):
        cells = line.split("\t")
        try:
            # One of our own lines that was cut short could be read as another number: top 12 as 1.
            row = None if index == complete and columns in (EARLIER_COLUMNS, OUR_COLUMNS) else row_of(columns, cells)
        except ValueError as error:
            if index < complete or not is_half_line(columns, cells):
                raise LogError(f"{name}, line {index + 1}: {error}") from error
            row = None
        if row is None:
            notes.append(f"the last line of {name} is not complete and is left out")
            break
        if row.idx in rows:
            raise LogError(f"{name}, line {index + 1}: image {row.idx} is in the log already")
        rows[row.idx] = row
        if row.radius > 0.0:
            decimals.append(-int(Decimal(cells[columns.index("radius")]).as_tuple().exponent))
    if undecodable := sum(row.input_digest == UNDECODABLE for row in rows.values()):
        notes.append(f"{name}: images that could not be decoded count as abstentions: {undecodable:,}")
    log = Log(tuple(rows.values()), settings, name, min(decimals, default=None), "radius" in columns, tuple(notes))
    return log, columns


def _text(data: bytes, name: str) -> str:
    """Returns the text, in UTF-8 or in UTF-16 with its mark. A torn last line may end within a character."""
    try:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        complete, newline, last = data.removeprefix(codecs.BOM_UTF8).rpartition(b"\n")
        return (complete + newline).decode() + last.decode(errors="replace")
    except UnicodeDecodeError as error:
        raise LogError(f"{name}: not a certification log, nor any other text") from error


def _head(lines: list[str], name: str) -> tuple[Settings, Columns, int]:
    """Returns the settings in the first lines, the columns, and the index of the first row's line."""
    settings: Settings = {}
    for index, line in enumerate(lines):
        if not line.startswith("#"):
            columns = tuple(line.split("\t"))
            known = any(columns[: len(form)] == form for form in (COHEN_COLUMNS, PREDICT_COLUMNS))
            if known and len(set(columns)) == len(columns):
                return settings, columns, index + 1
            found = repr(line[:60]) if line.strip() else "none"
            raise LogError(f"{name}, line {index + 1}: not a certification log: expected {_WANTED}, found {found}")
        match = _SETTING.fullmatch(line)
        if match is None or match[1] in settings:
            raise LogError(f"{name}, line {index + 1}: expected '# key: value' with a new key, found {line[:60]!r}")
        settings[match[1]] = match[2].strip()
    raise LogError(f"{name}: not a certification log: expected {_WANTED}, found none")
