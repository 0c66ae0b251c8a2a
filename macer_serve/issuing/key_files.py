"""Key files: written once, readable by their owner alone, never overwritten."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from macer_serve.errors import IssuerKeyError
from macer_serve.issuing.documents import MAX_BYTES


def write_new(path: Path, text: str) -> None:
    """Write a new file with mode 0600, completely or not at all. Raises `IssuerKeyError`, also if it exists."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # unlike a rename, a link never replaces a file
    except FileExistsError:
        raise IssuerKeyError(
            f"{path} exists and is left as it is: a key that is overwritten can never sign again"
        ) from None
    except OSError as error:
        raise IssuerKeyError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def others_can_read(path: Path) -> bool:
    """Returns whether users other than the owner can read the file. Returns False if files have no such modes."""
    return os.name == "posix" and path.is_file() and bool(path.stat().st_mode & 0o077)


def read(path: Path) -> bytes:
    """Returns the content of a key file, at most one byte more than the largest. Raises `IssuerKeyError`."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise IssuerKeyError(f"{path} cannot be read: {error.strerror or error}") from None
