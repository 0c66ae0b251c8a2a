"""Copies of checkpoints by digest. What is served does not change if the folder that it came from is overwritten.

The copies lie in `XDG_CACHE_HOME`, or `~/.cache`, under `macer-serve/checkpoints`. Every copy is whole or absent. The
digests of its files are checked whenever it is loaded. A copy is locked while a process uses it, and removed when a
later deployment finds it unlocked and old.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from macer_serve.checkpoint.config import CheckpointConfig
from macer_serve.checkpoint.folder import CONFIG, load_config, read_file, resolve
from macer_serve.errors import CheckpointError, OutputError

KEPT_S = 3600.0  # without use: longer than any deployment takes from its first voter to its last
_NAME = re.compile(r"\.?[0-9a-f]{64}(\..+)?")
_held: dict[Path, int] = {}  # open folders, locked until this process ends


def cache_folder() -> Path:
    """Returns the folder that holds the copies of this user."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "macer-serve" / "checkpoints"


def pin(checkpoint: str | Path, digest: str | None = None) -> CheckpointConfig:
    """Copies a checkpoint to its place by digest, if it is not there; returns its configuration.

    If `digest` is given and a copy of it is there, the checkpoint itself is not read. Raises `CheckpointError` for a
    checkpoint that cannot be read, is damaged or has another digest, `OutputError` if there is no room.
    """
    if digest is not None and (copy := _whole_copy(digest)) is not None:
        return copy
    config, folder = load_config(checkpoint), resolve(checkpoint)
    if digest not in (None, config.digest):
        raise CheckpointError(
            f"{checkpoint} holds checkpoint {config.digest}, but {digest} is to be served, of which this machine has "
            "no copy. Put that checkpoint back, or deploy again"
        )
    files = {name: read_file(folder, config, name) for name in config.files}
    if _whole_copy(config.digest) is None:
        _write(_place(config.digest), config, files)
    return config


def pinned(digest: str, checkpoint: str | Path) -> Path:
    """Returns the copy of that digest, a checkpoint's folder, and keeps it until this process ends.

    If this machine has no copy, it is made of `checkpoint`. Raises as `pin` does.
    """
    while True:
        pin(checkpoint, digest)
        if _hold(_place(digest)):  # nobody removed it meanwhile
            return _place(digest)


def remove_unused(unused_s: float = KEPT_S) -> list[Path]:
    """Removes the copies that no process holds and that were not asked for in so many seconds; returns their places."""
    removed = []
    for place in sorted(cache_folder().glob("*")) + sorted(cache_folder().glob(".*")):
        if not _NAME.fullmatch(place.name) or place in _held:
            continue
        with contextlib.suppress(OSError), _alone(place) as unused:  # another process has just removed it
            if unused and time.time() - place.stat().st_mtime >= unused_s:
                _remove(place)
                removed.append(place)
    return removed


def _place(digest: str) -> Path:
    return cache_folder() / digest.removeprefix("sha256:")


def _whole_copy(digest: str) -> CheckpointConfig | None:
    """Returns the configuration of the copy of that digest, now used; None if there is none, or it is damaged."""
    place = _place(digest)
    try:
        os.utime(place)
        copy = load_config(place)
        for name in copy.files:
            read_file(place, copy, name)
    except (OSError, CheckpointError):
        return None
    return copy if copy.digest == digest else None


def _write(place: Path, config: CheckpointConfig, files: dict[str, bytes]) -> None:
    """Writes a copy for reading only. If another process was faster, its copy stays."""
    staging = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        text = json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n"
        for name, data in {**files, CONFIG: text.encode()}.items():
            (staging / name).write_bytes(data)
            (staging / name).chmod(0o444)
        staging.chmod(0o755)
        if _whole_copy(config.digest) is None:
            _remove(place)  # a damaged copy
        staging.rename(place)
    except OSError as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(
                f"{place.parent} cannot be written: {error.strerror or error}. Served checkpoints are copied there; "
                "set XDG_CACHE_HOME to a folder that can be written"
            ) from error


def _remove(place: Path) -> None:
    """Removes a copy. It is out of its place at once."""
    if place.exists():
        trash = Path(tempfile.mkdtemp(prefix=f".{place.name.strip('.')[:64]}.", dir=place.parent))
        place.rename(trash / "copy")
        shutil.rmtree(trash)


def _hold(place: Path) -> bool:
    """Locks a copy until this process ends. Returns False if it is not there."""
    if place in _held:
        if _is_current(_held[place], place):
            return True
        os.close(_held.pop(place))
    try:
        handle = os.open(place, os.O_RDONLY)
    except FileNotFoundError:
        return False
    _lock(handle, shared=True)
    if not _is_current(handle, place):  # removed before it was locked
        os.close(handle)
        return False
    _held[place] = handle
    return True


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Yields whether no process holds the copy; none can lock it until the block ends."""
    handle = os.open(place, os.O_RDONLY)
    try:
        yield _lock(handle, shared=False) and _is_current(handle, place)
    finally:
        os.close(handle)


def _lock(handle: int, *, shared: bool) -> bool:
    """Returns whether the folder is now locked. Waits for a shared lock, but not to be alone.

    Without locks (Windows, some network drives), nobody is known to be alone, and no copy is removed.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _is_current(handle: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), place.stat())
    except FileNotFoundError:
        return False
