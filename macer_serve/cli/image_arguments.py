"""Images as arguments of commands: a path, or `-` for standard input."""

from __future__ import annotations

import sys

MAX_BYTES = 2**28  # of standard input; the limits of uploads are stricter


def image_of(argument: str) -> str | bytes:
    """Returns the path itself, or the bytes of standard input for `-`."""
    return sys.stdin.buffer.read(MAX_BYTES + 1) if argument == "-" else argument
