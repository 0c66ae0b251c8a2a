"""Pillow images as the decoder sees their files: the very same pixels, or a refusal that says what to do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from macer_serve.errors import MacerError, ParameterError, UndecodableError, UnsupportedTypeError
from macer_serve.images import DEFAULT_LIMITS, UploadLimits, check_size, decode
from macer_serve.pixels import upright_rgb

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I;16L", "I;16N")
_OUR_FORMATS = ("PNG", "JPEG", "MPO", "WEBP")  # MPO: a JPEG with a second picture, which the decoder judges
_FROM_NUMBERS = 'scale its values to 0 to 255, then image.convert("L")'
_CONVERSIONS = {
    "I": _FROM_NUMBERS,
    "F": _FROM_NUMBERS,
    "La": 'image.convert("LA")',
    "PA": 'image.convert("RGBA")',
    "RGBa": 'image.convert("RGBA")',
}


def of_pillow(image: Image.Image, limits: UploadLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """Returns the pixels of a Pillow image as `decode` gives those of its file: uint8 [height, width, 3], RGB.

    A file that Pillow has opened but not yet loaded is read by `decode`, with its limits. Raises `UploadError` for an
    image of several pictures, too many pixels, or data that cannot be loaded, and `ParameterError` if the image does
    not say what its numbers mean.
    """
    try:
        data = _unloaded_file(image, limits)
        if data is not None:
            return decode(data, limits)
        if getattr(image, "n_frames", 1) != 1:
            raise UnsupportedTypeError("an image of several pictures is not accepted: give one of them")
        if image.mode not in MODES:
            how = _CONVERSIONS.get(image.mode, 'image.convert("RGB")')
            raise ParameterError(
                f"a Pillow image must have one of the modes {', '.join(MODES)}, not {image.mode}: convert it, {how}"
            )
        check_size(*image.size, limits)
        image.load()
        exif = image.info.get("exif", b"")
        pixels, *others = (upright_rgb(image, depth, exif) for depth in _depths(image))
    except MacerError:
        raise
    except Exception as error:  # a file may be opened and not yet decoded: then anything goes, as in `decode`
        raise UndecodableError("the Pillow image cannot be loaded: its file is truncated, damaged or closed") from error
    if not all(np.array_equal(pixels, other) for other in others):
        raise ParameterError(
            "the image has a transparent colour, and Pillow no longer tells of how many bits: give the file itself, or "
            'del image.info["transparency"] first to ignore it'
        )
    return pixels


def _unloaded_file(image: Image.Image, limits: UploadLimits) -> bytes | None:
    """Returns the file of an image that Pillow has opened as it is and not yet loaded, at most one byte too many."""
    file = getattr(image, "fp", None)
    untouched = getattr(image, "_im", None) is None and not getattr(image, "decoderconfig", ()) and image.tell() == 0
    if file is None or image.format not in _OUR_FORMATS or not untouched:
        return None
    position = file.tell()
    file.seek(0)
    try:
        return bytes(file.read(limits.bytes + 1))
    finally:
        file.seek(position)


def _depths(image: Image.Image) -> tuple[int, ...]:
    """Returns the bits per channel that the file of a loaded image may have had, if its transparent colour needs them.

    Pillow widens grey of 2 and 4 bits to 8 and narrows colours of 16 bits to 8, but leaves the transparent colour as
    the file gives it.
    """
    key = image.info.get("transparency")
    if key is not None and image.mode == "L":
        return (8,) if (np.asarray(image) % 17).any() else (8, 4, 2)  # 255 / 15 = 17 divides 255 / 3
    if key is not None and image.mode == "RGB":
        return (16,) if max(key) > 255 else (8, 16)
    return (1,) if image.mode == "1" else (16,) if image.mode.startswith("I") else (8,)
