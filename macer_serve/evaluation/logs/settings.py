"""The settings of a log, in a JSON file beside it: `log.tsv.json` for `log.tsv`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macer_serve.atomic_writes import atomic_file
from macer_serve.errors import LogError, ParameterError

Settings = dict[str, str | int | float]

VERSION = 1
MAX_BYTES = 2**20


def settings_path(log: Path) -> Path:
    """Returns the path of the settings of a log."""
    return log.with_name(log.name + ".json")


def check_settings(settings: Mapping[str, Any]) -> Settings:
    """Returns the settings. Raises `ParameterError` for names and values that JSON would not give back as they are."""
    for key, value in settings.items():
        plain = isinstance(key, str) and type(value) in (str, int, float)
        if not plain or value != value or value in (math.inf, -math.inf) or not _encodable(key, value):
            raise ParameterError(f"setting {key!r} must be text or a finite number, not {value!r}")
    return dict(settings)


def _encodable(*values: object) -> bool:
    try:
        "".join(map(str, values)).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def read_settings(log: Path) -> Settings | None:
    """Returns the settings of a log, or None if there are none. Raises `LogError` if another file is in their place."""
    path = settings_path(log)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LogError(f"{path}: {error.strerror or error}") from error
    try:
        document = json.loads(data.decode("utf-8-sig"))
        if len(data) > MAX_BYTES or document["log"] != VERSION:
            raise ParameterError(f"its version is not {VERSION}")
        return check_settings(document["settings"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LogError(f"{path} does not hold the settings of a certification log: {error}") from error


def write_settings(log: Path, settings: Settings) -> None:
    """Write the settings of a log, whole or not at all. Raises `OutputError`."""
    document = json.dumps({"log": VERSION, "settings": settings}, indent=2, ensure_ascii=False)
    with atomic_file(settings_path(log)) as file:
        file.write(document.encode() + b"\n")
