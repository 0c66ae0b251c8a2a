"""Uploads: every file gives the stated pixels or an `UploadError`."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import Bytes8, chunk, exif, noise, png, saved
from numpy.typing import NDArray
from PIL import Image, ImageOps

from macer_serve.errors import ParameterError, TooLargeError, UndecodableError, UnsupportedTypeError, UploadError
from macer_serve.images import MAX_PIXELS, UploadLimits, decode
from macer_serve.serving.problems import status_of

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


def over_white(rgba: Bytes8) -> Bytes8:
    """The exact composite, rounded to the nearest integer, in plain integers."""
    c, a = rgba[..., :3].astype(int), rgba[..., 3:].astype(int)
    return ((2 * (c * a + 255 * (255 - a)) + 255) // 510).astype(np.uint8)


def grey3(grey: NDArray[np.integer]) -> Bytes8:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


RGB = noise(7, 5, 3)
RGBA = noise(64, 64, 4)
WIDE = np.random.default_rng(3).integers(0, 2**16, (6, 4, 4), dtype=np.uint16)


# --- decoding: exact pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [saved(RGB, "PNG"), saved(RGB, "WEBP", lossless=True)], ids=["png", "webp"])
def test_lossless_files_give_their_pixels(data: bytes) -> None:
    u = decode(data)
    assert u.dtype == np.uint8
    assert u.flags.c_contiguous
    assert u.flags.writeable
    np.testing.assert_array_equal(u, RGB)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"quality": 95}])
def test_lossy_files_give_what_their_codec_decodes(kind: str, options: dict[str, int]) -> None:
    data = saved(noise(40, 24, 3), kind, **options)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_progressive_and_grey_jpeg() -> None:
    for picture in (noise(33, 21, 3), noise(33, 21)):
        data = saved(picture, "JPEG", progressive=True)
        np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("key", [None, 0, 1])
def test_grey_png_of_any_depth_is_stretched_to_eight_bits_and_its_key_is_white(depth: int, key: int | None) -> None:
    values = np.arange(8) % 2**depth
    bits = np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
    between = [] if key is None else [chunk(b"tRNS", struct.pack(">H", key))]
    grey = values * (255 // (2**depth - 1))
    if key is not None:
        grey[values == key] = 255
    u = decode(png(8, 1, depth, 0, np.packbits(bits.ravel()).tobytes(), *between))
    np.testing.assert_array_equal(u, grey3(grey[None]))


@pytest.mark.parametrize("transparent", [False, True])
def test_sixteen_bit_grey_keeps_its_high_byte(transparent: bool) -> None:
    values = np.array([[0, 1, 255, 256, 0x1234, 0x12FF, 0x7FFF, 0x8000, 65535]])
    between = [chunk(b"tRNS", struct.pack(">H", 0x1234))] if transparent else []
    expected = values >> 8
    if transparent:
        expected[values == 0x1234] = 255
    u = decode(png(9, 1, 16, 0, values.astype(">u2").tobytes(), *between))
    np.testing.assert_array_equal(u, grey3(expected))


def test_sixteen_bit_colour_keeps_its_high_bytes() -> None:
    high = (WIDE >> 8).astype(np.uint8)
    np.testing.assert_array_equal(decode(png(4, 6, 16, 2, WIDE[..., :3].astype(">u2").tobytes())), high[..., :3])
    np.testing.assert_array_equal(decode(png(4, 6, 16, 6, WIDE.astype(">u2").tobytes())), over_white(high))
    grey_alpha = high[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(
        decode(png(4, 6, 16, 4, WIDE[..., :2].astype(">u2").tobytes())), over_white(grey_alpha)
    )


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_an_rgb_png_is_white(depth: int) -> None:
    pixels, key = np.array([[[1, 2, 3], [1, 2, 4], [9, 9, 9]]]), (1, 2, 3)
    shift, kind = (0, "u1") if depth == 8 else (8, ">u2")
    tRNS = chunk(b"tRNS", struct.pack(">HHH", *(k << shift for k in key)))
    u = decode(png(3, 1, depth, 2, (pixels << shift).astype(kind).tobytes(), tRNS))
    np.testing.assert_array_equal(u, [[[255, 255, 255], [1, 2, 4], [9, 9, 9]]])


@pytest.mark.parametrize("alphas", [b"", b"\x00", b"\xff\x00", b"\x80\x40\xff\x00"])
def test_palette_with_and_without_transparency(alphas: bytes) -> None:
    palette, indices = noise(4, 3, seed=1), np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
    between = [chunk(b"PLTE", palette.tobytes())] + ([chunk(b"tRNS", alphas)] if alphas else [])
    rgba = np.concatenate([palette, np.frombuffer(alphas.ljust(4, b"\xff"), np.uint8)[:, None]], axis=1)
    np.testing.assert_array_equal(decode(png(4, 2, 8, 3, indices.tobytes(), *between)), over_white(rgba)[indices])


def test_transparency_is_composited_over_white_to_the_nearest_integer() -> None:
    every = np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1).astype(np.uint8)  # every (c, alpha)
    rgba = every[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(decode(saved(rgba, "PNG")), over_white(rgba))
    np.testing.assert_array_equal(decode(saved(RGBA, "PNG")), over_white(RGBA))
    np.testing.assert_array_equal(decode(saved(RGBA, "WEBP", lossless=True, exact=True)), over_white(RGBA))
    np.testing.assert_array_equal(decode(saved(Image.fromarray(every, "LA"), "PNG")), over_white(rgba))


def test_cmyk_jpeg() -> None:
    flat = Image.new("CMYK", (16, 16), (0, 128, 255, 64))
    data = saved(flat, "JPEG", quality=100)
    loaded = Image.open(io.BytesIO(data))
    assert loaded.mode == "CMYK"
    np.testing.assert_array_equal(decode(data), np.asarray(loaded.convert("RGB")))
    assert np.abs(decode(data)[8, 8].astype(int) - [191, 95, 0]).max() <= 4


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int, order: str) -> None:
    data = saved(
        noise(24, 16, 3), kind, exif=exif(orientation, order), **({"lossless": True} if kind == "WEBP" else {})
    )
    np.testing.assert_array_equal(decode(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


@pytest.mark.parametrize("damage", [exif(0), exif(9), exif(6)[:-9], b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_malformed_exif_is_ignored(kind: str, damage: bytes) -> None:
    picture = noise(24, 16, 3)
    np.testing.assert_array_equal(decode(saved(picture, kind, exif=damage)), decode(saved(picture, kind)))


def test_overlapping_exif_entries_take_no_memory() -> None:
    """300 entries that all point at the same 5 MB, spread over EXIF segments: 1.5 GB if a parser copies them."""
    entries = b"".join(struct.pack("<HHII", 40_000 + i, 1, 5_000_000, 8) for i in range(300))
    block = b"II*\0" + struct.pack("<IH", 8, 300) + entries + b"\0\0\0\0" + bytes(5_100_000)
    pieces = (b"Exif\0\0" + block[i : i + 65_000] for i in range(0, len(block), 65_000))
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 2) + p for p in pieces)
    plain = saved(noise(16, 16, 3), "JPEG")
    bare = plain[:2] + plain[plain.index(b"\xff\xdb") :]  # without the JFIF header, whose resolution Pillow prefers
    tracemalloc.start()
    try:
        u = decode(bare[:2] + segments + bare[2:])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(u, decode(bare))
    assert peak < 40e6


# --- decoding: refusals -------------------------------------------------------------------------------------------


def test_too_many_bytes_are_refused_and_the_limit_is_named() -> None:
    data = saved(RGB, "PNG")
    assert decode(data, UploadLimits(bytes=len(data))).shape == RGB.shape
    with pytest.raises(TooLargeError, match=f"at most {len(data) - 1}"):
        decode(data, UploadLimits(bytes=len(data) - 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("lossless", [False, True])
def test_too_many_pixels_are_refused_and_the_limit_is_named(kind: str, lossless: bool) -> None:
    data = saved(noise(40, 50, 3), kind, lossless=lossless)
    assert decode(data, UploadLimits(pixels=2000)).shape == (40, 50, 3)
    with pytest.raises(TooLargeError, match="50 x 40 pixels; send at most 1,999"):
        decode(data, UploadLimits(pixels=1999))


PNG_BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
JPEG_BOMB = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 50_000, 50_000, 3) + bytes(9)
WEBP_BOMB = b"RIFF\x12\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (2**24 - 1).to_bytes(3, "little") * 2


@pytest.mark.parametrize(
    "bomb",
    [PNG_BOMB, PNG_BOMB + chunk(b"IDAT", zlib.compress(bytes(10**7))) + chunk(b"IEND", b""), JPEG_BOMB, WEBP_BOMB],
    ids=["png header", "png", "jpeg", "webp"],
)
def test_a_bomb_is_refused_before_anything_is_decoded(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError, match="send at most 25,000,000"):
            decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_compressed_text_and_profiles_are_never_expanded() -> None:
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(10**8)))
    np.testing.assert_array_equal(decode(png(5, 7, 8, 2, RGB.tobytes(), text)), RGB)


def test_limits_reach_no_further_than_the_decoder() -> None:
    for limits in ({"bytes": 0}, {"pixels": 0}, {"pixels": MAX_PIXELS + 1}):
        with pytest.raises(ParameterError, match="at least 1 byte"):
            UploadLimits(**limits)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello", bytes(1000), noise(1000).tobytes(), b"%!PS", b"\x89PNG", b"RIFF"]
)
def test_what_is_no_image_is_undecodable(data: bytes) -> None:
    with pytest.raises(UndecodableError, match="send a PNG, JPEG or WebP"):
        decode(data)


OTHERS = {
    "GIF": saved(RGB, "GIF"),
    "BMP": saved(RGB, "BMP"),
    "TIFF": saved(RGB, "TIFF"),
    "AVIF": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1",
    "HEIF": b"\0\0\0\x20ftypheic\0\0\0\0mif1heic",
    "SVG": b'<?xml version="1.0"?>\n<!-- drawn by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PDF": b"%PDF-1.7\n",
    "ICO": saved(noise(16, 16, 3), "ICO"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_image_types_are_named_and_refused(name: str) -> None:
    with pytest.raises(UnsupportedTypeError, match=f"{name}.*send a PNG, JPEG or WebP"):
        decode(OTHERS[name])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_several_pictures_in_one_file_are_refused(kind: str) -> None:
    first, second = (Image.fromarray(noise(16, 16, 3, seed=seed)) for seed in (1, 2))
    data = saved(first, kind, save_all=True, append_images=[second])
    with pytest.raises(UnsupportedTypeError, match="send a PNG, JPEG or WebP file of one picture"):
        decode(data)


def test_a_photograph_with_a_brightness_map_is_an_ordinary_photograph() -> None:
    first, second = (Image.fromarray(noise(16, 16, 3, seed=seed)) for seed in (1, 2))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version="1.0"/>'
    data = saved(first, "MPO", save_all=True, append_images=[second])
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    np.testing.assert_array_equal(decode(data), decode(saved(first, "JPEG")))


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_zero_sized_images_are_undecodable(size: tuple[int, int]) -> None:
    jpeg = bytearray(JPEG_BOMB)
    jpeg[7:11] = struct.pack(">HH", *size)
    for data in (png(*size, 8, 0, b""), bytes(jpeg)):
        with pytest.raises(UndecodableError):
            decode(data)


VALID = {
    "png": saved(noise(24, 16, 3), "PNG"),
    "png palette": saved(Image.fromarray(noise(24, 16, 3)).quantize(16), "PNG", transparency=3),
    "png 16 bit": png(4, 6, 16, 6, WIDE.astype(">u2").tobytes()),
    "jpeg": saved(noise(24, 16, 3), "JPEG", exif=exif(6)),
    "jpeg progressive": saved(noise(24, 16, 3), "JPEG", progressive=True),
    "jpeg cmyk": saved(Image.fromarray(noise(24, 16, 4), "CMYK"), "JPEG"),
    "webp": saved(noise(24, 16, 3), "WEBP"),
    "webp alpha": saved(noise(24, 16, 4), "WEBP", exif=exif(6)),
    "webp lossless": saved(noise(24, 16, 4), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", VALID)
def test_a_file_cut_anywhere_is_undecodable(name: str) -> None:
    data = VALID[name]
    assert decode(data).size
    for length in range(0, len(data) - (data[-1] == 0 and name.startswith("webp"))):  # but for RIFF's padding byte
        with pytest.raises(UndecodableError):
            decode(data[:length])


@pytest.mark.parametrize("at", range(8, len(VALID["png"]), 11))
def test_a_png_with_any_byte_changed_is_refused(at: int) -> None:
    data = bytearray(VALID["png"])
    data[at] ^= 0x10
    with pytest.raises(UploadError):
        decode(bytes(data))


def test_files_of_countless_empty_pieces_are_refused() -> None:
    jpeg = VALID["jpeg"]
    for data in (
        jpeg[:2] + b"\xff\xfe\0\2" * 60_000 + jpeg[2:],
        png(5, 7, 8, 2, RGB.tobytes(), chunk(b"IDAT", b"") * 60_000),
    ):
        with pytest.raises(UndecodableError, match=r"more than 50,000 .*save it again"):
            decode(data)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = VALID["jpeg progressive"]
    scan, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    with pytest.raises(UndecodableError, match="scans"):
        decode(data[:end] + data[scan:end] * 200 + data[end:])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_the_bytes_an_array_or_an_upload_error(draw: st.DataObject) -> None:
    data = bytearray(VALID[draw.draw(st.sampled_from(sorted(VALID)))])
    edits = st.tuples(st.integers(0, len(data) - 1), st.sampled_from(["set", "cut", "insert"]), st.binary(max_size=6))
    for at, edit, new in draw.draw(st.lists(edits, min_size=1, max_size=6)):
        data[at : at + (0 if edit == "insert" else len(new))] = b"" if edit == "cut" else new
    if draw.draw(st.booleans()) and data.startswith(b"\x89PNG"):  # past the checksums, to the decoder itself
        position = 8
        while position + 12 <= len(data):
            end = position + 8 + int.from_bytes(data[position : position + 4])
            data[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
            position = end + 4
    try:
        u = decode(bytes(data), UploadLimits(pixels=100_000))
    except UploadError as error:
        status, message = status_of(error), str(error)
    else:
        assert u.dtype == np.uint8
        assert u.ndim == 3
        assert u.shape[2] == 3
        return
    assert status in (400, 413, 415)
    assert "send" in message


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\0\0\0WEBPVP8X", b"II*\0", b"<?xml", b""]),
    st.binary(),
)
def test_random_bytes_behind_a_magic_number(magic: bytes, rest: bytes) -> None:
    with pytest.raises(UploadError):
        decode(magic + rest)
