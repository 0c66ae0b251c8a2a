"""What callers may give for an image, brought to pixels by the one decoder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from macer_serve.errors import ParameterError, UndecodableError, UploadError
from macer_serve.images import Reduction, UploadLimits, decode
from macer_serve.pillow_images import of_pillow

Image = bytes | bytearray | str | Path | BinaryIO | Pillow.Image | npt.NDArray[np.uint8]

ACCEPTED = (
    "a path, encoded bytes, a binary file, a Pillow image, or a uint8 array [height, width] or [height, width, 1 or 3]"
)


def pixels_of(image: Image, limits: UploadLimits) -> npt.NDArray[np.uint8]:
    """Returns the pixels of an image, uint8 `[height, width, 3]`, RGB.

    Takes what `ACCEPTED` says. Raises `UploadError` for what is not an acceptable image, `ParameterError` for an object
    of another kind.
    """
    if isinstance(image, str | os.PathLike):
        return of_file(str(image), limits)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image), limits)
    if isinstance(image, Pillow.Image):
        return of_pillow(image, limits)
    if isinstance(image, np.ndarray):
        return _of_array(image)
    if hasattr(image, "read"):
        data = image.read(limits.bytes + 1)
        if not isinstance(data, bytes):
            raise ParameterError(f"a file must be opened in binary mode; this one gives {type(data).__name__}")
        return decode(data, limits)
    raise ParameterError(f"an image must be {ACCEPTED}, not {type(image).__name__}")


_ADDRESS = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]+:/|[dD][aA][tT][aA]:)")  # a Path turns http:// into http:/


def of_file(path: str, limits: UploadLimits, reduction: Reduction | None = None) -> npt.NDArray[np.uint8]:
    """Returns the pixels of the file at a path, as `decode` does. Every error names the file."""
    name = path[:200]
    if _ADDRESS.match(path):
        raise ParameterError(f"{name}: addresses are not fetched; download the image and give its path")
    if os.path.isdir(path):
        raise UndecodableError(f"{name} is a folder, not an image: give the files in it")
    try:
        with Path(path).open("rb") as file:
            return decode(file.read(limits.bytes + 1), limits, reduction)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise UndecodableError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    except UploadError as error:
        raise type(error)(f"{name}: {error}") from error


def _of_array(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if type(pixels) not in (np.ndarray, np.memmap):  # a mask, or a matrix's own arithmetic, would be lost in silence
        raise ParameterError(
            f"pixels must be a plain NumPy array, not a {type(pixels).__name__}: give np.asarray(pixels), or "
            "pixels.filled(value) if it is masked"
        )
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ParameterError(f"pixels must be uint8 [H, W] or [H, W, C], not {pixels.dtype} {pixels.shape}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ParameterError(f"pixels must have 1 or 3 channels and be non-empty, not {pixels.shape}")
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
