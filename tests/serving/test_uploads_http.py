"""Hostile uploads over HTTP: each is answered with a clear 4xx, or certified, and the server lives on."""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from image_files import hundreds_of_files
from PIL import Image

from macer_serve.checkpoint import load_config
from macer_serve.datasets import load_dataset
from macer_serve.images import UploadLimits
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import SmoothedClassifier

MIB = 2**20
PROBLEM = "application/problem+json"
RNG = np.random.default_rng(0)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """A smooth picture of that size: gradients, so that JPEG keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, x * 0 + 90], 2).astype(np.uint8)).convert(
        mode
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size, over a few bytes of pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), (i * 80, 0, 0)) for i in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


PNG_FILE = saved(photograph())
JPEG_FILE = saved(photograph(), "JPEG")
REFUSED = {
    "empty": (b"", 400),
    "text": (b"not an image at all", 400),
    "html": (b"<html><script>alert(1)</script></html>", 400),
    "zeros": (bytes(100_000), 400),
    "png cut short": (PNG_FILE[:-30], 400),
    "png header only": (PNG_FILE[:20], 400),
    "png damaged": (PNG_FILE[:60] + b"\xff" + PNG_FILE[61:], 400),
    "jpeg cut short": (JPEG_FILE[: len(JPEG_FILE) // 2], 400),
    "webp cut short": (saved(photograph(), "WEBP")[:-40], 400),
    "no pixels": (png_header(0, 10), 400),
    "bomb": (png_header(50_000, 50_000), 413),
    "bomb of one row": (png_header(2**31 - 1, 1), 413),
    "bomb of one column": (png_header(1, 30_000_000), 413),
    "gif": (saved(photograph(), "GIF"), 415),
    "animated gif": (animation("GIF"), 415),
    "animated png": (animation("PNG"), 415),
    "animated webp": (animation("WEBP"), 415),
    "bmp": (saved(photograph(), "BMP"), 415),
    "tiff": (saved(photograph(), "TIFF"), 415),
    "20 MB of zeros": (bytes(20 * MIB), 413),
    "one byte too many": (bytes(10 * MIB + 1), 413),
}
ACCEPTED = {
    "16 bits": saved(Image.fromarray(RNG.integers(0, 2**16, (40, 40), np.uint16))),
    "grey": saved(photograph(mode="L")),
    "bilevel": saved(photograph(mode="1")),
    "palette": saved(photograph(mode="P")),
    "palette with transparency": saved(photograph(mode="P"), transparency=0),
    "alpha": saved(photograph(mode="RGBA")),
    "cmyk": saved(photograph(mode="CMYK"), "JPEG"),
    "progressive": saved(photograph(), "JPEG", progressive=True),
    "one pixel": saved(photograph(1, 1)),
    "extreme aspect": saved(Image.new("L", (20_000_000, 1), 200)),
    "extreme aspect, upright": saved(Image.new("L", (1, 20_000_000), 200)),
    "as large as allowed": saved(Image.new("L", (5000, 5000), 200)),
}


@pytest.fixture(autouse=True)
def no_trace_of_it(server: Any, client: httpx.Client, images: list[bytes]) -> Iterator[None]:
    """After every upload the server certifies, and has logged no traceback for a user's mistake."""
    yield
    answer = client.post("/predict?model=quick&n=1", content=images[1], headers={"content-type": "image/png"})
    assert answer.status_code == 200
    assert "Traceback" not in server.replica_logs()


def post(client: httpx.Client, data: bytes | Iterator[bytes], **parameters: Any) -> httpx.Response:
    headers = {"content-type": "image/png"}
    return client.post("/predict", params={"model": "quick", **parameters}, content=data, headers=headers)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_by_a_problem_document(client: httpx.Client, name: str) -> None:
    data, status = REFUSED[name]
    multipart = client.post("/predict?model=quick", files={"file": ("x.png", data, "image/png")})
    for answer in (post(client, data), multipart):
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == PROBLEM
        assert len(answer.json()["detail"]) > 10


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_unusual_file_gets_its_certificate(client: httpx.Client, name: str) -> None:
    answer = post(client, ACCEPTED[name])
    assert answer.status_code == 200, answer.text
    assert answer.json()["certificate"]["n"] == 1000


def test_an_endless_upload_is_cut_off(client: httpx.Client) -> None:
    """Without a content length the bytes are counted as they come."""
    answer = post(client, (bytes(MIB) for _ in range(20)))
    assert answer.status_code == 413
    assert answer.headers["content-type"] == PROBLEM


def test_exif_orientation_is_applied(client: httpx.Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned = saved(photograph(), "JPEG", quality=95, exif=exif)
    upright = saved(Image.open(BytesIO(turned)).transpose(Image.Transpose.ROTATE_270))
    one, other = (post(client, data, n=1).json()["certificate"]["input"] for data in (turned, upright))
    assert one == other
    assert one["upload_shape"] == [64, 48, 3]


def test_the_input_is_that_of_a_data_set(client: httpx.Client, tmp_path: Path) -> None:
    """What is measured on a folder is what is served: here for a file of every kind."""
    kinds = ("colour0-depth16-7.png", "colour2-depth16-2.png", "colour3-depth4-8.png", "colour4-depth8-3.png")
    kinds += ("colour6-depth8-6.png", "L-6.jpg", "RGB-8.jpg", "CMYK-3.jpg", "RGB-5.webp", "RGBA-6.webp")
    files = {name: data for name, data in hundreds_of_files() if name in kinds}
    assert len(files) == len(kinds)
    (tmp_path / "val" / "a").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "val" / "a" / name).write_bytes(data)
    measured = SmoothedClassifier(
        load_config("bundled:cifar10"), noise="exact", issuer=EvaluationSeed(bytes(32)), limits=UploadLimits()
    )
    for name, (pixels, _) in zip(sorted(files), load_dataset("folder", tmp_path, "test"), strict=True):
        served = post(client, files[name], n=1).json()["certificate"]["input"]["digest"]
        assert served == measured.model_input(pixels).digest, name


def test_a_larger_photograph_has_a_radius_of_its_own(client: httpx.Client, images: list[bytes]) -> None:
    larger = saved(Image.open(BytesIO(images[1])).resize((320, 240), Image.Resampling.BICUBIC))
    answer = post(client, larger).json()
    assert answer["certificate"]["input"]["upload_shape"] == [240, 320, 3]
    assert answer["abstained"] is False
    # Averaging pixels shrinks changes, so that the upload may change by more than the model's input.
    assert answer["certificate"]["fit"]["norm"] < 1
    assert answer["upload_radius"] > answer["radius"] > 0


BOUNDARY = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--b\r\n"),
        (BOUNDARY, b""),
        (BOUNDARY, b"garbage" * 1000),
        (BOUNDARY, PART + PNG_FILE),  # no closing boundary
        (BOUNDARY, PART.replace(b"; filename", b"; x") + PNG_FILE + b"\r\n--b--\r\n"),
        (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n' * 5000 + b"--b--\r\n"),
        (BOUNDARY, b"--b\r\n" + b"X-Header: y\r\n" * 10_000 + b"\r\nx\r\n--b--\r\n"),
        (BOUNDARY, b"--b\r\nContent-Disposition: " + b"a" * 100_000 + b"\r\n\r\nx\r\n--b--\r\n"),
        (BOUNDARY + "; charset=utf-99", b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\xff\r\n--b--\r\n'),
        ("multipart/form-data; boundary=" + "b" * 5000, b"--b"),
        ('multipart/form-data; boundary="', b"--b"),
        ("multipart/form-data; boundary=\x01", b"--b"),
    ],
)
def test_multipart_garbage_is_refused(client: httpx.Client, kind: str, body: bytes) -> None:
    answer = client.post("/predict?model=quick", content=body, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text


def test_a_file_name_is_never_used(client: httpx.Client, images: list[bytes]) -> None:
    for name in ("../../etc/passwd", "a\0b", "<script>", "x" * 1000, ""):
        answer = client.post("/predict?model=quick&n=1", files={"file": (name, images[1], "text/html")})
        assert answer.status_code in (200, 400)  # an empty name makes it a text field
        assert "passwd" not in answer.text


HEAD = b"POST /predict?model=quick HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: image/png\r\n"


@pytest.mark.parametrize(
    "message",
    [
        HEAD + b"Content-Length: 20\r\n\r\n" + PNG_FILE,  # shorter than what follows
        HEAD + b"Content-Length: -1\r\n\r\n" + PNG_FILE,
        HEAD + b"Content-Length: many\r\n\r\n" + PNG_FILE,
        HEAD + b"Content-Length: 99999999999999999999\r\n\r\n" + PNG_FILE,
        HEAD + b"Content-Length: 10\r\nContent-Length: 20\r\n\r\n" + PNG_FILE,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        HEAD + b"X: " + b"a" * MIB + b"\r\n\r\n",
        HEAD + b"X: y\r\n" * 50_000 + b"\r\n",
        HEAD.replace(b"/predict", b"/" + b"a" * 200_000) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # a TLS greeting
        b"GARBAGE\r\n\r\n",
    ],
)
def test_broken_http_is_refused(server: Any, message: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        answer = b""
        try:
            connection.sendall(message)
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:  # hanging up is an answer, too
            pass
    assert not answer or answer.split()[1].startswith(b"4"), answer[:500]


def test_a_body_that_never_comes_whole_is_given_up_with_its_client(server: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD + b"Content-Length: 5000\r\n\r\n" + PNG_FILE[:100])
