"""Whether image files can be read, asked once per file: answers are cached until a file changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from macer_serve.datasets import read_image
from macer_serve.errors import DataError
from macer_serve.hardware import usable_cores
from macer_serve.version import __version__

log = logging.getLogger(__name__)

_AT_ONCE = 256  # files between two looks at the cache and at the progress
_NAMED_AT_MOST = 20  # files, in a message


def require_readable(paths: Iterable[str], *, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Reads every image that was not read before by this version.

    `progress` is called with the number of files done and their total. Raises `DataError` naming the files that cannot
    be read.
    """
    stamps = {path: _stamp(path) for path in dict.fromkeys(os.path.abspath(path) for path in paths)}
    cache = _cache_of(os.path.commonpath(stamps))
    known = _known(cache)
    left = [path for path, stamp in stamps.items() if stamp is None or known.get(path) != stamp]
    broken: list[str] = []
    with ThreadPoolExecutor(usable_cores()) as readers:  # Pillow decodes without the interpreter's lock
        for at in range(0, len(left), _AT_ONCE):
            part = left[at : at + _AT_ONCE]
            reasons = dict(zip(part, readers.map(_reason, part), strict=True))
            broken += [reason for reason in reasons.values() if reason]
            _remember(cache, [(path, *(stamps[path] or ())) for path, reason in reasons.items() if not reason])
            progress(at + len(part), len(left))
    if broken:
        more = len(broken) - _NAMED_AT_MOST
        listed = "".join(f"\n  {reason}" for reason in broken[:_NAMED_AT_MOST])
        raise DataError(
            f"{len(broken)} of {len(stamps):,} image files cannot be read:{listed}"
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nRemove or replace them, then run the same command again: a run that was interrupted continues."
        )


def _reason(path: str) -> str | None:
    """Returns what is wrong with a file, or None."""
    try:
        read_image(path)
    except DataError as error:
        return str(error).removesuffix("; remove or replace it")
    return None


Stamp = tuple[int, int]


def _stamp(path: str) -> Stamp | None:
    """Returns the size and the time of change of a file, or None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _cache_of(tree: str) -> Path:
    """Returns the file of the user's cache that tells which files of a tree could be read, one JSON line per file."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "macer-serve"
    digest = hashlib.sha256(json.dumps([__version__, tree]).encode()).hexdigest()
    return folder / f"readable-{digest[:32]}.jsonl"


def _known(cache: Path) -> dict[str, Stamp]:
    """Returns the files in the cache. A line that was cut off when it was written does not count."""
    try:
        lines = cache.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    known: dict[str, Stamp] = {}
    for line in lines:
        try:
            path, size, changed = json.loads(line)
        except (ValueError, TypeError):
            continue
        known[path] = (size, changed)
    return known


def _remember(cache: Path, files: list[tuple[object, ...]]) -> None:
    """Adds files to the cache. Without it the files are read again at the next start, which is no error."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps(file) + "\n" for file in files))
    except OSError as error:
        log.info("%s is not written: %s", cache, error)
