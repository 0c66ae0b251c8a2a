"""Files and folders that appear whole or not at all: written beside their place, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from macer_serve.errors import OutputError


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a new file that replaces `path` when the block ends; if the block raises, `path` stays as it was.

    Folders on the way are made. A symbolic link is followed: its target is replaced. Raises `OutputError` if there is
    no room or no right to write, also where the block raises `OSError`.
    """
    with _explained(path):
        place = _place(path)
        handle, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        staging = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            staging.chmod(0o644)
            staging.replace(place)
            _flush_folder(place.parent)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Makes a new folder of files that replaces `path` when the block ends; if it raises, `path` stays as it was.

    Folders on the way are made. A symbolic link is followed: its target is replaced. Raises `OutputError` if there is
    no room or no right to write, also where the block raises `OSError`.
    """
    with _explained(path):
        place = _place(path)
        if place.exists() and not place.is_dir():
            raise OutputError(f"{path} is a file, not a folder: choose another output")
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            yield staging
            for file in staging.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            staging.chmod(0o755)
            _flush_folder(staging)
            _put_in_place(staging, place)
            _flush_folder(place.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _put_in_place(staging: Path, place: Path) -> None:
    """Rename a folder to its place. The one that was there is put back if that fails."""
    if not place.exists():
        staging.rename(place)
        return
    retired = staging.with_name(staging.name + ".old")
    place.rename(retired)
    try:
        staging.rename(place)
    except BaseException:
        retired.rename(place)
        raise
    shutil.rmtree(retired)


def _place(path: str | Path) -> Path:
    """Returns where the output lies behind symbolic links; its parent is there. Raises `OutputError`, `OSError`."""
    place = Path(os.path.realpath(path))
    if os.path.islink(path) and not place.exists():
        raise OutputError(f"{path} is a symbolic link to {place}, which does not exist: remove the link, or mend it")
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, on systems that can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
