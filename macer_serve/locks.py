"""Locks on what one process writes at a time, and who holds them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from io import FileIO
from pathlib import Path
from weakref import WeakSet

_held: WeakSet[FileIO] = WeakSet()


class HeldError(Exception):
    """Another process holds the lock; the message says which, as far as it is known."""


def lock(file: FileIO) -> None:
    """Locks an open file until it is closed. Raises `HeldError` if another process, or another opening, holds it.

    Does nothing on systems that have no such lock, such as Windows and some network file systems.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HeldError(_holder(file)) from None
    except (ImportError, OSError):
        pass
    _held.add(file)


def lock_folder(folder: Path) -> FileIO:
    """Locks a folder, made if need be, by a file `lock` in it that says who holds it. Returns the open file.

    Raises `HeldError` if another process holds it, and `OSError` if the folder cannot be written.
    """
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = FileIO(path, "a+")
        except FileNotFoundError:  # the holder has just removed the folder
            continue
        except FileExistsError:
            if folder.exists() and not folder.is_dir():
                raise
            continue
        try:
            lock(file)
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except FileNotFoundError:  # the holder has just removed the file
            same = False
        except HeldError:
            file.close()
            raise
        if same:
            break
        file.close()
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}: {_command()}\n".encode())
    return file


def unlock_folder(folder: Path, file: FileIO) -> None:
    """Unlocks a folder, and removes it if it is empty."""
    with contextlib.suppress(OSError):
        (folder / "lock").unlink()
        folder.rmdir()
    file.close()


def _holder(file: FileIO) -> str:
    """Returns who holds the lock of a file: what a lock file says, or the process that Linux names."""
    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        text = file.read(2000).decode()
        if text.startswith("process ") and text.endswith("\n"):
            return text.strip()
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = os.fstat(file.fileno())
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        if holders := [line[4] for line in lines if line[1] == "FLOCK" and line[5] == place]:
            return f"process {holders[0]}"
    return "another process"


def _command() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:1000].replace("\n", " ")


def _forget() -> None:
    """In a child made by fork: closes its copies, or it would hold the locks of a parent that has ended."""
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
