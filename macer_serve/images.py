"""The only decoder of image files, for uploads and data sets alike: PNG, JPEG or WebP bytes to 8-bit RGB pixels.

Uploads are not trusted. Whatever a file makes Pillow do, the decoder returns an array or raises `UploadError`. "The
upload" means its decoded RGB pixels. Colour profiles are not applied, so the network sees the numbers in the file.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, WebPImagePlugin  # noqa: F401  (registers WebP without loading every plugin there is)

from macer_serve.errors import ParameterError, TooLargeError, UndecodableError, UnsupportedTypeError, UploadError
from macer_serve.pixels import orientation_of, upright_rgb

MAX_PIXELS = 89_478_485  # beyond this Pillow raises its own alarm
MAX_PIECES = 50_000  # PNG chunks or JPEG segments; ten megabytes hold millions of empty ones, each costing time
MAX_SCANS = 100  # of a progressive JPEG: each costs a pass over all pixels, for some ten bytes of upload
Reduction = Callable[[int, int], int]  # from an image's height and width to 1, 2, 4 or 8
SEND = "send a PNG, JPEG or WebP file"

_MAGIC = {
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\0{4}",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "HEIF or AVIF": rb".{4}ftyp(?:he[ivm]|mi[af]|msf|avi[fs])",
    "JPEG 2000": rb"\0{3}\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0{3}\x0cJXL ",
    "ICO": rb"\0\0\x01\0",
    "Photoshop": rb"8BPS",
    "PDF": rb"%PDF-",
    "SVG": rb"(?:\xef\xbb\xbf)?\s*<(?:svg|!DOCTYPE svg|(?:\?xml|!--).*?<svg)",
}
_OTHER_TYPES = {name: re.compile(magic, re.DOTALL) for name, magic in _MAGIC.items()}
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")  # the others stand alone or pad


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """The limits of an upload, in file bytes and in pixels (width x height). Raises `ParameterError` out of range."""

    bytes: int = 10 * 2**20
    pixels: int = 25_000_000

    def __post_init__(self) -> None:
        if self.bytes < 1 or not 1 <= self.pixels <= MAX_PIXELS:
            raise ParameterError(f"upload limits must be at least 1 byte and 1 to {MAX_PIXELS:,} pixels, not {self}")


DEFAULT_LIMITS = UploadLimits()


def decode(data: bytes, limits: UploadLimits = DEFAULT_LIMITS, reduction: Reduction | None = None) -> NDArray[np.uint8]:
    """The pixels of a PNG, JPEG or WebP file: uint8 [height, width, 3], RGB, EXIF orientation applied.

    Grey is repeated; 16 bits keep their high byte; transparency lies over white, (c a + 255 (255 - a)) / 255 to the
    nearest integer. A malformed EXIF block is ignored, as browsers do: the pixels are intact without it.

    With a `reduction`, which is for training only, a JPEG is decoded by the divisor that it returns for the upright
    height and width: faster, and with other pixels. Files of other types come whole.

    Raises `TooLargeError` (before pixels are decoded), `UnsupportedTypeError` for other or animated images, else
    `UndecodableError`; nothing else, whatever the bytes.
    """
    if len(data) > limits.bytes:
        raise TooLargeError(f"the file has {len(data):,} bytes; send at most {limits.bytes:,}")
    try:
        return _decode(data, limits, reduction)
    except UploadError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(f"the image has too many pixels; send at most {limits.pixels:,}") from error
    except Exception as error:  # hostile bytes make decoders raise almost anything, MemoryError included
        raise UndecodableError(f"the image is truncated or damaged: {SEND} that opens elsewhere") from error


def _decode(data: bytes, limits: UploadLimits, reduction: Reduction | None) -> NDArray[np.uint8]:
    depth, exif = 8, b""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind, (data, depth, exif) = "PNG", _scan_png(data, limits)
    elif data.startswith(b"\xff\xd8\xff"):
        kind, (data, exif) = "JPEG", _scan_jpeg(data, limits)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind = "WEBP"
        _scan_webp(data, limits)
    else:
        for name, magic in _OTHER_TYPES.items():
            if magic.match(data[:4096]):
                raise UnsupportedTypeError(f"{name} is not accepted: {SEND}")
        raise UndecodableError(f"the file is {'not an image' if data else 'empty'}: {SEND}")
    with Image.open(BytesIO(data), formats=(kind,)) as image:
        if image.format != kind or getattr(image, "n_frames", 1) != 1:
            raise UnsupportedTypeError(f"more than one picture in a file is not accepted: {SEND} of one picture")
        check_size(*image.size, limits)
        exif = exif or image.info.get("exif", b"")
        if reduction is not None:
            width, height = image.size if orientation_of(exif) < 5 else image.size[::-1]
            divisor = reduction(height, width)
            if kind == "JPEG":
                image.draft(None, (max(1, image.width // divisor), max(1, image.height // divisor)))
        image.load()
        return upright_rgb(image, depth, exif)


def largest_divisor(at_most: int) -> int:
    """Returns the largest divisor that a JPEG can be reduced by, of those up to `at_most`; 1 if there is none."""
    return next(divisor for divisor in (8, 4, 2, 1) if divisor <= max(1, at_most))


def check_size(width: int, height: int, limits: UploadLimits) -> None:
    if width < 1 or height < 1:
        raise UndecodableError(f"the image has no pixels ({width} x {height}): {SEND}")
    if width * height > limits.pixels:
        raise TooLargeError(f"the image has {width:,} x {height:,} pixels; send at most {limits.pixels:,} in all")


def _scan_png(data: bytes, limits: UploadLimits) -> tuple[bytes, int, bytes]:
    """The file with nothing but what its pixels need, bit depth and EXIF; checks size, animation, CRCs and end.

    Text, profiles and animation chunks never reach Pillow: they expand, and Pillow checks no CRC of pixel data.
    """
    width, height, depth = struct.unpack(">8x8xIIB", data[:25])
    if data[8:16] != b"\0\0\0\x0dIHDR":
        raise UndecodableError(f"the PNG file does not begin with its header: {SEND} that opens elsewhere")
    check_size(width, height, limits)
    kept, exif, position = [data[:8]], b"", 8
    for _ in range(MAX_PIECES):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + length + 12
        body = data[position + 4 : end - 4]
        if struct.unpack_from(">I", data, end - 4) != (zlib.crc32(body),):
            raise UndecodableError(f"a PNG checksum is wrong, the file is damaged: {SEND} that opens elsewhere")
        if name == b"acTL" and body[4:8] != b"\0\0\0\1":
            raise UnsupportedTypeError(f"an animated PNG is not accepted: {SEND} of one picture")
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[position:end])
        elif name == b"eXIf":
            exif = body[4:]
        if name == b"IEND":
            return b"".join(kept), depth, exif
        position = end
    raise UndecodableError(f"the PNG file has more than {MAX_PIECES:,} chunks: save it again, or send JPEG or WebP")


def _scan_jpeg(data: bytes, limits: UploadLimits) -> tuple[bytes, bytes]:
    """The file without metadata and without what follows its end, and the EXIF; checks size, scans and end.

    Pillow joins EXIF segments of any length and parses them on opening: what it never sees can neither expand nor warn.
    """
    kept, exif, scans, pictures, gain_map, keep_from, position = [], b"", 0, False, False, 0, 2
    for _ in range(MAX_PIECES):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            raise UndecodableError(f"the JPEG file ends early, it is truncated: {SEND} that opens elsewhere")
        marker, start = found[1][0], found.start()
        if marker == 0xD9:  # end of image
            kept.append(data[keep_from : found.end()])
            break
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
        body = data[found.end() + 2 : position]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # frame header
            height, width = struct.unpack_from(">xHH", body)
            check_size(width, height, limits)
        elif marker == 0xDA:
            scans += 1
            if scans > MAX_SCANS:
                raise UndecodableError(f"the JPEG has more than {MAX_SCANS} scans: save it again, or send PNG or WebP")
        elif 0xE1 <= marker <= 0xFE and marker != 0xEE:  # metadata; APP0 and APP14 say how colours are coded
            if marker == 0xE1 and not exif and body.startswith(b"Exif\0\0"):
                exif = body
            pictures |= marker == 0xE2 and body.startswith(b"MPF\0")
            gain_map |= b"hdrgm:Version" in body or b"iso:ts:21496" in body
            kept.append(data[keep_from:start])
            keep_from = position
    else:
        raise UndecodableError(f"the JPEG has more than {MAX_PIECES:,} segments: save it again, or send PNG or WebP")
    if pictures and not gain_map:  # phones attach a brightness map to an ordinary photograph: that one is welcome
        raise UnsupportedTypeError(f"a JPEG of several pictures (MPO) is not accepted: {SEND} of one picture")
    return b"".join(kept), exif


def _scan_webp(data: bytes, limits: UploadLimits) -> None:
    """Checks size, animation and length, before the decoder allocates a canvas."""
    length, kind = struct.unpack_from("<I4x4s", data, 4)
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    check_size(width, height, limits)
    if kind == b"VP8X" and data[20] & 2:
        raise UnsupportedTypeError(f"an animated WebP is not accepted: {SEND} of one picture")
    if length + 8 > len(data):
        raise UndecodableError(f"the WebP file ends early, it is truncated: {SEND} that opens elsewhere")
