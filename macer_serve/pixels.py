"""From a loaded Pillow image to upright 8-bit RGB pixels."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def upright_rgb(image: Image.Image, depth: int, exif: bytes) -> NDArray[np.uint8]:
    """Returns a loaded image as it is to be seen: uint8 [height, width, 3], RGB, contiguous and writable.

    `depth` is the number of bits per channel in its PNG file, by which a transparent colour is given. `exif` is the
    EXIF block that holds the orientation.
    """
    return np.ascontiguousarray(_oriented(_rgb(image, depth), orientation_of(exif)))


def _rgb(image: Image.Image, depth: int) -> NDArray[np.uint8]:
    """Returns the loaded image as uint8 [height, width, 3]. A transparent colour (PNG's tRNS) has `depth` bits."""
    key = image.info.get("transparency")
    if image.mode in ("1", "L") or image.mode.startswith("I"):
        wide = np.asarray(image.convert("L") if image.mode == "1" else image)
        grey = (wide >> 8 if image.mode.startswith("I") else wide).astype(np.uint8)
        if key is not None:
            full = (1 << depth) - 1
            stretch = 255 // full if depth < 8 else 1  # Pillow has brought 1, 2 and 4 bits to 8, but not the key
            grey[wide == (key & full) * stretch] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "RGB" and key is not None:  # Pillow keeps the high bytes of 16 bits: compare those
        rgb = np.array(image)
        rgb[(rgb == np.array([k >> 8 if depth == 16 else k & 255 for k in key], np.uint8)).all(axis=2)] = 255
        return rgb
    if image.mode not in ("LA", "RGBA") and not (image.mode == "P" and image.has_transparency_data):
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # RGB, palette, CMYK
    rgba = np.asarray(image.convert("RGBA")).reshape(-1, 4)
    over = np.empty((len(rgba), 3), np.uint8)
    for at in range(0, len(rgba), 2**20):  # in pieces: 16-bit intermediates of a whole upload are large
        piece = rgba[at : at + 2**20].astype(np.uint16)
        alpha = piece[:, 3:]
        over[at : at + 2**20] = (piece[:, :3] * alpha + 255 * (255 - alpha) + 127) // 255  # below 2^16; 255 has no ties
    return over.reshape(image.height, image.width, 3)


def orientation_of(exif: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (as stored) if it is absent or malformed."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    try:
        if order:
            (offset,) = struct.unpack_from(order + "I", tiff, 4)
            (entries,) = struct.unpack_from(order + "H", tiff, offset)
            for at in range(offset + 2, offset + 2 + 12 * entries, 12):
                tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at)
                if (tag, kind, count) == (0x0112, 3, 1) and 1 <= value <= 8:
                    return int(value)
    except struct.error:
        pass
    return 1


def _oriented(u: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Returns the stored pixels turned as EXIF tag 0x0112 says."""
    if orientation >= 5:
        u, orientation = u.swapaxes(0, 1), {5: 1, 6: 2, 7: 3, 8: 4}[orientation]
    return {1: u, 2: u[:, ::-1], 3: u[::-1, ::-1], 4: u[::-1]}[orientation]
