"""A Pillow image has the pixels of its file, or is refused with what to do; so are arrays that are no plain arrays."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import chunk, exif, noise, png, saved
from PIL import Image, ImageFile

from macer_serve.errors import ParameterError, TooLargeError, UndecodableError, UnsupportedTypeError
from macer_serve.images import DEFAULT_LIMITS, UploadLimits, decode
from macer_serve.inputs import pixels_of
from macer_serve.pillow_images import of_pillow

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

RGBA = Image.fromarray(noise(24, 16, 4))
OF_16_BITS = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (24, 16), dtype=np.uint16))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def with_transparency(image: Image.Image, key: int | bytes) -> Image.Image:
    image = image.copy()
    image.info["transparency"] = key
    return image


MADE: dict[str, Image.Image] = {
    **{mode: RGBA.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "I;16": OF_16_BITS,
    "P of RGB": RGBA.convert("RGB").quantize(20),
    "P, one index transparent": with_transparency(RGBA.convert("RGB").quantize(20), 3),
    "P, a list of alphas": with_transparency(RGBA.convert("RGB").quantize(20), bytes([0, 255, 100, 7])),
    "L, a colour transparent": with_transparency(RGBA.convert("L"), RGBA.convert("L").getpixel((3, 4))),  # type: ignore[arg-type]
    "1, a colour transparent": with_transparency(RGBA.convert("1"), 0),
    "I;16, a colour transparent": with_transparency(OF_16_BITS, OF_16_BITS.getpixel((3, 4))),  # type: ignore[arg-type]
    "P of RGBA": RGBA.quantize(20, method=Image.Quantize.FASTOCTREE),
}


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("name", MADE)
def test_an_image_made_in_memory_has_the_pixels_of_the_file_it_is_saved_to(name: str, orientation: int | None) -> None:
    image = MADE[name].copy()
    if orientation is not None:
        image.info["exif"] = exif(orientation)
    data = saved(image, "PNG", **({} if orientation is None else {"exif": exif(orientation)}))
    np.testing.assert_array_equal(of_pillow(image), decode(data))


def test_cmyk_is_what_pillow_makes_of_it() -> None:
    image = Image.fromarray(noise(24, 16, 4), "CMYK")
    np.testing.assert_array_equal(of_pillow(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("order", ["I;16B", "I;16L", "I;16N"])
def test_sixteen_bits_in_any_byte_order_keep_their_high_byte(order: str) -> None:
    values = np.asarray(OF_16_BITS)
    image = Image.frombytes(order, (16, 24), values.astype(">u2" if order == "I;16B" else "<u2").tobytes())
    np.testing.assert_array_equal(of_pillow(image)[..., 0], values >> 8)


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("I", r"scale its values to 0 to 255, then image\.convert\(\"L\"\)"),
        ("F", r"scale its values to 0 to 255, then image\.convert\(\"L\"\)"),
        ("La", r"image\.convert\(\"LA\"\)"),
        ("PA", r"image\.convert\(\"RGBA\"\)"),
        ("RGBa", r"image\.convert\(\"RGBA\"\)"),
        *((mode, r"image\.convert\(\"RGB\"\)") for mode in ("YCbCr", "LAB", "HSV", "RGBX")),
    ],
)
def test_other_modes_are_refused_with_how_to_convert_them(mode: str, how: str) -> None:
    image = Image.new(mode, (5, 4))
    with pytest.raises(ParameterError, match=rf"modes 1, L, LA, P, RGB, RGBA, CMYK, .*, not {mode}: convert it, {how}"):
        of_pillow(image)
    assert of_pillow(image.convert(how.split('"')[1].rstrip("\\"))).shape == (4, 5, 3)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_transparent_colour_of_sixteen_bits_is_compared_by_its_high_bytes(loaded: bool) -> None:
    pixels, key = np.array([[[0x1234, 0x4512, 0x0007], [0x3412, 0x1245, 0x0700]]]), (0x1234, 0x4512, 0x0007)
    data = png(2, 1, 16, 2, pixels.astype(">u2").tobytes(), chunk(b"tRNS", struct.pack(">HHH", *key)))
    image = opened(data)
    if loaded:
        image.load()
    np.testing.assert_array_equal(of_pillow(image), [[[255, 255, 255], [0x34, 0x12, 0x07]]])
    np.testing.assert_array_equal(decode(data), of_pillow(image))


def test_a_transparent_colour_of_unknown_depth_is_refused_with_what_to_give() -> None:
    """Key 2 is black among 16 bits, and itself among 8; a grey of 2 is the brighter of the two middles of 2 bits."""
    rgb = png(2, 1, 16, 2, bytes(6) + b"\2\0" * 3, chunk(b"tRNS", struct.pack(">HHH", 2, 2, 2)))
    grey = png(4, 1, 2, 0, b"\x1b", chunk(b"tRNS", struct.pack(">H", 2)))
    for data in (rgb, grey):
        image = opened(data)
        np.testing.assert_array_equal(of_pillow(image), decode(data))
        image.load()
        for unclear in (image, image.copy()):
            with pytest.raises(ParameterError, match=r"transparent colour.*give the file itself, or del image"):
                of_pillow(unclear)
        del image.info["transparency"]
        np.testing.assert_array_equal(of_pillow(image), np.asarray(image.convert("RGB")))
    of_eight_bits = Image.fromarray(noise(24, 16), "L")
    of_eight_bits.info["transparency"] = int(noise(24, 16)[0, 0])
    assert of_pillow(of_eight_bits)[0, 0].tolist() == [255] * 3


def without_its_end(data: bytes) -> bytes:
    return data[:-12] if data.startswith(b"\x89PNG") else data[:-2]


def with_a_wrong_checksum(data: bytes) -> bytes:
    at = data.index(b"IEND") - 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGED: dict[str, bytes] = {
    "PNG": without_its_end(saved(noise(24, 16, 3), "PNG")),
    "PNG's checksum": with_a_wrong_checksum(saved(noise(24, 16, 3), "PNG")),
    "JPEG": without_its_end(saved(noise(24, 16, 3), "JPEG")),
    "JPEG's half": saved(noise(64, 64, 3), "JPEG")[:2000],
    "PNG's half": saved(noise(64, 64, 3), "PNG")[:6000],
}


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_that_pillow_opened_is_refused_as_its_bytes_are(
    name: str, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    for image in (DAMAGED[name], opened(DAMAGED[name])):
        with pytest.raises(UndecodableError):
            pixels_of(image, DEFAULT_LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_closed_image_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(saved(RGBA.convert("RGB"), kind))
    closed = Image.open(path)
    closed.close()
    file = path.open("rb")
    without_file = Image.open(file)
    file.close()
    for image in (closed, without_file):
        with pytest.raises(UndecodableError, match="truncated, damaged or closed"):
            of_pillow(image)


def test_the_image_stays_as_it_was() -> None:
    image = opened(saved(noise(24, 16, 3), "PNG"))
    for _ in range(2):
        np.testing.assert_array_equal(of_pillow(image), noise(24, 16, 3))
    np.testing.assert_array_equal(np.asarray(image), noise(24, 16, 3))
    image.putpixel((0, 0), (1, 2, 3))
    assert of_pillow(image)[0, 0].tolist() == [1, 2, 3], "what was drawn on it counts"


def test_a_reduced_jpeg_is_the_reduced_picture() -> None:
    image = opened(saved(noise(64, 64, 3), "JPEG"))
    image.draft("RGB", (16, 16))
    assert of_pillow(image).shape == (16, 16, 3)


def test_the_limits_of_files_hold() -> None:
    data = saved(noise(24, 16, 3), "PNG")
    with pytest.raises(TooLargeError, match="bytes"):
        of_pillow(opened(data), UploadLimits(bytes=len(data) - 1))
    for image in (opened(data), Image.fromarray(noise(24, 16, 3))):
        with pytest.raises(TooLargeError, match="pixels"):
            of_pillow(image, UploadLimits(pixels=383))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO", "GIF", "TIFF"])
def test_an_image_of_several_pictures_is_refused(kind: str) -> None:
    frames = [Image.fromarray(noise(16, 16, 3, seed=seed)) for seed in (1, 2)]
    image = opened(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
    for _ in range(2):
        with pytest.raises(UnsupportedTypeError):
            of_pillow(image)
        image.seek(1)


def test_a_photograph_with_a_brightness_map_is_an_ordinary_photograph() -> None:
    frames = [Image.fromarray(noise(16, 16, 3, seed=seed)) for seed in (1, 2)]
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version="1.0"/>'
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    np.testing.assert_array_equal(of_pillow(opened(data)), decode(data))


MASKED = np.ma.masked_array(noise(8, 8, 3), noise(8, 8, 3) > 99)
ARRAYS: dict[str, Callable[[], Any]] = {
    "MaskedArray": lambda: MASKED,
    "matrix": lambda: noise(8, 8).view(np.matrix),
    "recarray": lambda: noise(8, 8, 3).view(np.recarray),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_more_than_arrays_are_refused(name: str) -> None:
    with pytest.raises(ParameterError, match=rf"plain NumPy array, not a {name}: give np\.asarray"):
        pixels_of(ARRAYS[name](), DEFAULT_LIMITS)


def test_an_array_in_a_file_is_taken(tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", noise(8, 8, 3))
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    np.testing.assert_array_equal(pixels_of(mapped, DEFAULT_LIMITS), noise(8, 8, 3))
