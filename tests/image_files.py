"""Image files of every kind that the decoder takes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Bytes8 = NDArray[np.uint8]


def noise(*shape: int, seed: int = 0) -> Bytes8:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image | Bytes8, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *between: bytes) -> bytes:
    """A hand-written PNG; `rows` are its raw scan lines, without filter bytes; `between` are chunks before the data."""
    stride = len(rows) // height if height else 0
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = header + b"".join(between) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def exif(orientation: int, order: str = "<") -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + head + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIZES = ((1, 1), (7, 5), (32, 32), (33, 20), (40, 61))  # (width, height)
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's number of the colour type
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def hundreds_of_files() -> Iterator[tuple[str, bytes]]:
    """Returns 312 named files: all modes, bit depths, transparencies and formats, by orientation, profile and size."""
    for colour, depths in DEPTHS.items():
        for depth in depths:
            for i in range(12):
                yield f"colour{colour}-depth{depth}-{i}.png", _png(colour, depth, i)
    for mode in ("L", "RGB", "CMYK"):
        for i in range(24):
            image = _noisy(mode, i)
            options = {"quality": 40 + 2 * i, "progressive": i % 3 == 0, **_metadata(i)}
            yield f"{mode}-{i}.jpg", saved(image, "JPEG", **options)
    for mode in ("RGB", "RGBA"):
        for i in range(30):
            options = {"lossless": i % 2 == 0, "exact": i % 4 == 0, **_metadata(i)}
            yield f"{mode}-{i}.webp", saved(_noisy(mode, i), "WEBP", **options)


def _noisy(mode: str, i: int) -> Image.Image:
    width, height = SIZES[i % len(SIZES)]
    return Image.fromarray(noise(height, width, 4, seed=i)).convert(mode)


def _metadata(i: int) -> dict[str, bytes]:
    """Every orientation, none and a malformed one, in both byte orders; every second file has a profile."""
    oriented = {} if i % 10 == 0 else {"exif": exif(i % 10, "<>"[i % 2])}
    return {**oriented, **({"icc_profile": PROFILE} if i % 2 else {})}


def _png(colour: int, depth: int, i: int) -> bytes:
    width, height = SIZES[i % len(SIZES)]
    values = np.random.default_rng(i).integers(0, 2**depth, (height, width, CHANNELS[colour]), dtype=np.uint16)
    between = [chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(PROFILE))] if i % 2 else []
    if colour == 3:
        between.append(chunk(b"PLTE", noise(2**depth, 3, seed=i).tobytes()))
    if i % 3:  # alphas of a part of the palette, or the colour of one of the pixels
        key = noise(1 + i % 2**depth, seed=i).tobytes() if colour == 3 else values[0, 0].astype(">u2").tobytes()
        between += [chunk(b"tRNS", key)] if colour in (0, 2, 3) else []
    if i % 10:
        between.append(chunk(b"eXIf", exif(i % 10, "<>"[i % 2])[6:]))
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape, 2), axis=-1)[..., 16 - depth :]
    return png(width, height, depth, colour, np.packbits(bits.reshape(height, -1), axis=1).tobytes(), *between)
