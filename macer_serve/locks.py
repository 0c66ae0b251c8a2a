"""One writer per output: a lock on a file or folder that is being written, and who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from macer_serve.errors import OutputError

_MAX_BYTES = 4096  # of a lock file; its text is about 100
_held: set[int] = set()  # the lock files that this process has open


def _forget() -> None:
    """Close a child process's copies of the lock files, which would hold the locks of a parent that has ended."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Holds the lock of an output, a file or a folder, that need not exist yet. A symbolic link locks its target.

    The lock is `.NAME.lock` beside the output. The operating system releases it when its holder ends, however it ends.
    Raises `OutputError` at once if another process or thread holds it, or if no file can be written there.
    On systems and file systems without such locks (Windows, some network drives) there is no lock.
    """
    try:
        output = Path(os.path.realpath(path))
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.with_name(f".{output.name}.lock")
        handle = _acquired(file)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    if handle is None:
        raise OutputError(f"{path} is being written by {_holder(file)}: wait for it, or choose another output")
    _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:  # not in a child process
            _held.remove(handle)
            with contextlib.suppress(FileNotFoundError):
                file.unlink()  # while it is still locked: see `_acquired`
            os.close(handle)


def _acquired(file: Path) -> int | None:
    """Returns the open lock file, which names this process; None if another holds it. Raises `OSError`."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if not _lock(handle):
                os.close(handle)
                return None
            if _is_current(handle, file):
                since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(holder).encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it before this process locked it


def _lock(handle: int) -> bool:
    """Returns whether this process now holds the lock, or can hold none on this system."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # the file system has no locks
    return True


def _is_current(handle: int, file: Path) -> bool:
    """Returns whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    """Returns in words what a lock file says about its holder."""
    try:
        with file.open("rb") as handle:
            holder = json.loads(handle.read(_MAX_BYTES))
        return f"process {int(holder['pid'])} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # removed, or not written yet
        return "another process"
