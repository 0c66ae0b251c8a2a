"""How large a network and its description may be, and how files and JSON are read within these limits.

A file from elsewhere may state any size in a few bytes. Each limit is far above what classifiers have, and low enough
that nothing is allocated or computed for long before it is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from macer_serve.errors import CheckpointError

MAX_BYTES = 2**31 - 1  # of a model; an ONNX file cannot hold more
MAX_CONFIG_BYTES = 2**24  # of config.json, or of a file of class names
MAX_CLASSES = 100_000  # ImageNet-21k has 21,841; a certificate's votes are one number per class
MAX_INPUT_VALUES = 2**22  # C * H * W, such as 3 x 1182 x 1182: 16 MiB per noisy copy in fp32
MAX_RESIZE = 8192  # of an upload's short side
SIGMA_RANGE = (0.005, 4.0)
_MAX_NESTING = 32  # of JSON; config.json has 4


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Returns a file's bytes. Raises `CheckpointError` if it is missing, no regular file, or larger than `limit`."""
    try:
        if path.exists() and not path.is_file():  # a device may be endless
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than the {limit:,} bytes that are allowed")
    return data


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text. Raises `ValueError` if it is damaged or nested deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_MAX_NESTING):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [value for values in inner for value in values]
    if level:
        raise ValueError("it is nested too deeply")
    return value
