"""Writing logs: one flushed line per image, so that a run can be killed and continued at any time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, Self

from macer_serve.errors import LogError, OutputError
from macer_serve.evaluation.logs.reading import GZIP_MAGIC, parse
from macer_serve.evaluation.logs.rows import EARLIER_COLUMNS, OUR_COLUMNS, Row, line_of
from macer_serve.evaluation.logs.settings import Settings, check_settings, read_settings, settings_path, write_settings
from macer_serve.locks import locked

_HEAD = ("\t".join(OUR_COLUMNS) + "\n").encode()
_ELSE = "choose another file for this log"


class LogWriter:
    """A log open for appending. `rows` are the rows that it held when it was opened, `done` their images."""

    def __init__(self, path: Path, file: FileIO, rows: tuple[Row, ...], opened: ExitStack) -> None:
        self.path = path
        self.rows = rows
        self.done = frozenset(row.idx for row in rows)
        self._file, self._opened = file, opened
        self._written = set(self.done)

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any]) -> Self:
        """Returns a writer that starts the log at `path`, or continues the log after its last complete line.

        The settings, text or finite numbers by name, are written to the file beside the log before its first line.
        Raises `LogError` if the file is no log of ours, has other settings, or is being written by another run, and
        `ParameterError` for settings of another type.
        """
        path, settings = Path(path), check_settings(settings)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as opened:
                opened.enter_context(locked(path))  # two runs would write images twice
                # Unbuffered: a write is done or raises at once, never later in close().
                file = opened.enter_context(path.open("a+b", buffering=0))
                file.seek(0)
                data = file.read()
                rows: tuple[Row, ...] = ()
                if len(data) < len(_HEAD) and _HEAD.startswith(data):  # new, or killed before its first row
                    read_settings(path)  # a file of another kind is not overwritten
                    write_settings(path, settings)
                    file.truncate(0)
                    _append(file, _HEAD)
                else:
                    rows = _rows_to_continue(data, path, settings)
                    file.truncate(data.rfind(b"\n") + 1)
                return cls(path, file, rows, opened.pop_all())
        except OutputError as error:
            raise LogError(str(error)) from error
        except OSError as error:
            raise LogError(f"{path}: {error.strerror or error}") from error

    def write(self, row: Row) -> None:
        """Append the row, and return when it is on the disk. Raises `LogError` for an image that is in the log."""
        if row.idx in self._written:
            raise LogError(f"{self.path}: image {row.idx} is in the log already")
        try:
            _append(self._file, line_of(row).encode())
        except OSError as error:
            self.close()  # the next row must not be appended to what may be half a line
            raise LogError(f"{self.path}: {error.strerror or error}") from error
        self._written.add(row.idx)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _append(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def _rows_to_continue(data: bytes, path: Path, settings: Settings) -> tuple[Row, ...]:
    """Returns the rows of a log that is continued. Raises `LogError` if the log cannot be, or has other settings."""
    if data.startswith(GZIP_MAGIC):
        raise LogError(f"{path} is compressed; decompress it to continue it, or {_ELSE}")
    log, columns = parse(data, str(path))
    if log.settings or columns == EARLIER_COLUMNS:
        raise LogError(f"{path} was written by an earlier version; {_ELSE}")
    if columns != OUR_COLUMNS or not data.startswith(_HEAD):
        raise LogError(f"{path} has other columns than {' '.join(OUR_COLUMNS)}; {_ELSE}")
    before = read_settings(path)
    if before is None:
        raise LogError(f"{settings_path(path)}, which holds the settings of {path}, is missing; {_ELSE}")
    differing = [
        f"{key} ({before.get(key, 'absent')} there, {settings.get(key, 'absent')} now)"
        for key in dict.fromkeys((*before, *settings))
        if before.get(key) != settings.get(key)
    ]
    if differing:
        raise LogError(f"{path} was written with other settings: {', '.join(differing)}; {_ELSE}")
    return log.rows
