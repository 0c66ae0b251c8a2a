"""Hostile HTTP requests: mutated images, forms and JSON, odd parameters and headers, and what is no HTTP."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import urllib.parse
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

MAX_BYTES = 300_000  # of a mutated file

Make = Callable[[random.Random, Sequence[bytes]], bytes]


def corpus(images: Sequence[Path]) -> list[bytes]:
    """Returns the image files, and each of them in other formats, modes and sizes."""
    files = [path.read_bytes() for path in images if path.stat().st_size <= MAX_BYTES]
    for path in images[:8]:
        picture = Image.open(path).convert("RGB")
        for kind, mode, options in (
            ("PNG", "P", {}),
            ("PNG", "RGBA", {}),
            ("PNG", "I;16", {}),
            ("PNG", "1", {}),
            ("JPEG", "RGB", {}),
            ("JPEG", "CMYK", {"progressive": True}),
            ("WEBP", "RGB", {}),
            ("WEBP", "RGBA", {"lossless": True}),
            ("GIF", "P", {}),
            ("TIFF", "RGB", {}),
            ("BMP", "RGB", {}),
        ):
            file = io.BytesIO()
            picture.convert("L").convert("I;16").save(file, kind) if mode == "I;16" else picture.convert(mode).save(
                file, kind, **options
            )
            files.append(file.getvalue())
    return files


def mutated(rng: random.Random, files: Sequence[bytes]) -> bytes:
    """Returns one of the files, changed at one to eight places; half of the PNG files get correct checksums."""
    data = bytearray(rng.choice(files))
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data) + 1)
        size = min(rng.choice((1, 1, 2, 4, 16, 200)), len(data) - at)
        change = rng.randrange(7)
        if change == 0:
            data[at : at + size] = rng.randbytes(size)
        elif change == 1:
            data[at : at + size] = bytes([rng.choice((0, 255, 127, 128))]) * size
        elif change == 2:
            del data[at : at + size]
        elif change == 3:
            data[at:at] = rng.randbytes(size)
        elif change == 4:
            data[at:at] = data[at : at + 200]
        elif change == 5:
            other = rng.choice(files)
            data[at:] = other[rng.randrange(len(other)) :]
        elif rng.random() < 0.3:
            del data[at:]
    if data[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.5:
        return _checked(bytes(data[:MAX_BYTES]))
    return bytes(data[:MAX_BYTES])


def _checked(png: bytes) -> bytes:
    """Returns a PNG file with the checksums that its chunks should have, so that decoding goes on."""
    whole, at = png[:8], 8
    while at + 12 <= len(png):
        size = struct.unpack(">I", png[at : at + 4])[0]
        if at + 12 + size > len(png):
            break
        body = png[at + 4 : at + 8 + size]
        whole += png[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return whole + png[at:]


def words(text: str) -> list[str]:
    """Returns the words of a text."""
    return text.split()


VALUES = words("0 -1 1 1e999 nan inf -0 0x10 true False null [] {} % ' ../../etc/passwd 1;2 1,2 1_0 0.1e-400 quick é ٣")
VALUES += ["", " ", "\x00", "\ud7ff", "9" * 400, "a" * 3000, "5e-324", "1e308"]
NAMES = ["", *words("model n alpha radius tolerance mode timeout_s stream coarse seed N n[]")]
CHARSETS = words("undefined utf-16 utf-7 idna punycode base64 rot13 zlib hex unicode_escape x\\0")
PATHS = ["/predict", "/v1/predict", "/predict/", "/v1/predict/"]
OTHER_PATHS = words("""/ /docs /docs/x /docs/../docs /docs/%2e%2e/x /models /healthz /readyz /metrics /openapi.json
/.well-known/jwks.json /-/healthz /-/routes // /%00 /%ff /predict/x * /predict?
http://localhost/predict /predict#x""")
OTHER_PATHS += ["/a" * 500, "/?" + "a=1&" * 2000]
METHODS = words("GET HEAD PUT DELETE PATCH OPTIONS TRACE CONNECT POST PRI get PROPFIND")
HEADERS = words("""
X-Request-ID serve_multiplexed_model_id serve-multiplexed-model-id x-request-timeout-seconds x-session-id
x-request-disconnect-disabled x_session_id x-serve-router-a x-forwarded-for x-forwarded-proto x-forwarded-host forwarded
host content-length transfer-encoding expect connection upgrade te trailer origin sec-fetch-site accept accept-encoding
range content-encoding cookie authorization if-none-match traceparent tracestate http2-settings last-event-id
access-control-request-method access-control-request-headers content-type""")
HEADERS += ["x" * 500]
CONTENTS = [
    word.encode()
    for word in words("""
0 -1 nan ?1 1e999 100-continue chunked websocket h2c upgrade close keep-alive,Upgrade identity,chunked null , gzip
https://evil.example cross-site bytes=0- localhost multipart/form-data multipart/form-data;boundary="
application/json;charset=utf-16""")
]
CONTENTS += [b"", b"a\tb", b"\xff", b"\xff" * 50, b"\x80\x81", b"\xc3\xa9", b"image/\xff", b"a" * 9000]


def request(
    body: bytes,
    kind: bytes = b"image/png",
    query: str = "",
    path: str = "/predict",
    more: bytes = b"",
    method: str = "POST",
) -> bytes:
    """Returns a request that asks for the connection to be closed."""
    head = (
        f"{method} {path}{'?' + query if query else ''} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".encode()
    )
    return head + b"Content-Type: " + kind + b"\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def an_image(rng: random.Random, files: Sequence[bytes]) -> bytes:
    """Returns an upload of a mutated image, in one of the three ways."""
    data, query, path = mutated(rng, files), "n=1", rng.choice(PATHS)
    way = rng.randrange(3)
    if way == 0:
        return request(data, query=query, path=path)
    if way == 1:
        body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + data + b"\r\n--B--\r\n"
        return request(body, b"multipart/form-data; boundary=B", query, path)
    return request(json.dumps({"image": base64.b64encode(data).decode()}).encode(), b"application/json", query, path)


def a_form(rng: random.Random, files: Sequence[bytes]) -> bytes:
    """Returns a multipart body with mutated parts, framing and content type."""
    boundary = rng.choice(["B", "-" * 69, "a b", "B" * 80, '"', "", "\\", "B;x", "é"])
    parts = b""
    for _ in range(rng.choice((0, 1, 1, 2, 3, 20))):
        name = rng.choice(["file", "file", "a", "", "é", 'a"b', "n", "x" * 2000])
        more = rng.choice(
            ["", '; filename="x"', '; filename="../x"', "; filename*=undefined''x", '; filename=""', "; name*=a"]
        )
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n'.encode()
        head += rng.choice(
            [
                b"",
                b"Content-Type: text/plain; charset=undefined\r\n",
                b"X: \xff\r\n",
                b"Content-Transfer-Encoding: base64\r\n",
            ]
        )
        parts += head + b"\r\n" + rng.choice([rng.randbytes(50), rng.choice(files), b"xn--\xff", b""]) + b"\r\n"
    body = bytearray(parts + f"--{boundary}--\r\n".encode())
    for _ in range(rng.choice((0, 0, 1, 3))):
        at = rng.randrange(len(body))
        body[at : at + rng.randrange(5)] = rng.choice([b"", b"\r\n", b"\0", b"--", b"\xff", b'"', b"\n"])
    kind = f"multipart/form-data; boundary={boundary}".encode("latin-1")
    if rng.random() < 0.5:
        kind += b"; charset=" + rng.choice(CHARSETS).encode()
    return request(bytes(body), kind, "n=1")


def a_document(rng: random.Random, files: Sequence[bytes]) -> bytes:
    """Returns a JSON body that is wrong, or nearly right."""
    image = base64.b64encode(rng.choice(files)).decode()
    text = rng.choice(
        [
            json.dumps({"image": image}),
            json.dumps({"image": [image]}),
            json.dumps({"image": image, rng.choice([*NAMES, "\ud800", "\0"]): 1}),
            json.dumps({"image": rng.choice([None, 1, {}, "\ud800", "=", "data:image/png;base64,", "\0", "A" * 5])}),
            "[" * rng.choice((10, 100_000)),
            '{"image":' * rng.choice((10, 900, 50_000)),
            "1" * rng.choice((10, 5000, 100_000)),
            '{"image": "' + image,
            json.dumps(rng.choice(VALUES)),
            "NaN",
            "[" + "[]," * rng.choice((100, 100_000)) + "1]",
        ]
    )
    body = text.encode(rng.choice(["utf-8", "utf-8", "utf-16", "utf-32", "utf-8-sig"]), "surrogatepass")
    if rng.random() < 0.3:
        at = rng.randrange(len(body))
        body = body[:at] + rng.randbytes(rng.randrange(4)) + body[at + 1 :]
    return request(
        body, rng.choice([b"application/json", b"application/json; charset=undefined", b"APPLICATION/JSON"]), "n=1"
    )


def parameters(rng: random.Random, files: Sequence[bytes]) -> bytes:
    """Returns an upload of an image with odd parameters. Few copies are voted on, whatever is accepted."""
    given = [(rng.choice(NAMES), rng.choice(VALUES)) for _ in range(rng.randint(1, 4))]
    query = urllib.parse.urlencode(given, errors="replace") if rng.random() < 0.7 else "&".join(map("=".join, given))
    query = "".join(c if 32 < ord(c) < 127 and c != "#" else urllib.parse.quote(c) for c in query)
    if not any(name in ("n", "mode", "model") for name, _ in given):
        query += "&n=1"
    elif "n" not in dict(given):
        query += "&n=2"
    return request(rng.choice(files), query=query, path=rng.choice(PATHS))


def headers(rng: random.Random, files: Sequence[bytes]) -> bytes:
    """Returns an upload with odd headers beside its own."""
    more = b""
    for _ in range(rng.choice((1, 1, 2, 3, 60))):
        name = rng.choice(HEADERS)
        more += (name.upper() if rng.random() < 0.2 else name).encode() + b": " + rng.choice(CONTENTS) + b"\r\n"
    return request(rng.choice(files), query="n=1", more=more)


def another_path(rng: random.Random, files: Sequence[bytes]) -> bytes:
    """Returns a request of any method to any path."""
    body = rng.choice([b"", b"", rng.choice(files)])
    return request(body, path=rng.choice(OTHER_PATHS + PATHS), method=rng.choice(METHODS))


def no_http(rng: random.Random, files: Sequence[bytes]) -> bytes:
    """Returns a request whose own bytes are changed, or something that is no HTTP at all."""
    message = bytearray(request(rng.choice(files), query="n=1"))
    head = message.index(b"\r\n\r\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(head)
        message[at : at + rng.randrange(4)] = rng.choice(
            [b"", b"\r\n", b"\0", b"\n", b" ", b"\xff", b":", b"\t", b"\r", b"%"]
        )
    odd = [
        rng.randbytes(300),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"\r\n" * 500,
        request(b"x").replace(b"Content-Length: 1", b"Transfer-Encoding: chunked") + b"fffffffffffffffff\r\n",
        request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        + b"5;"
        + b"x" * 9000
        + b"\r\nhello\r\n0\r\n\r\n",
        request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        + b"0\r\n"
        + b"X: y\r\n" * 500
        + b"\r\n",
        request(b"").replace(b"Content-Length: 0", b"Content-Length: 99999999999999999999"),
        request(b"").replace(b"Content-Length: 0", b"Content-Length: 0\r\nContent-Length: 5"),
        request(b"").replace(b"Content-Length: 0", b"X: " + b"a" * 2**20),
        request(b"").replace(b"Content-Length: 0", b"X: y\r\n" * 5000),
        request(b"").replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: localhost\r\n", b""),
        request(b"").replace(b"/predict", b"/" + b"a" * 70_000),
        request(b"").replace(b"Connection: close\r\n", b"") + request(b"GARBAGE") + b"GARBAGE\r\n\r\n",
        request(b"").replace(b"Host: localhost", b"Host: evil.example"),
    ]
    return bytes(message) if rng.random() < 0.7 else rng.choice(odd)


KINDS: dict[str, tuple[Make, float]] = {  # and their shares
    "mutated images": (an_image, 0.4),
    "forms": (a_form, 0.12),
    "JSON": (a_document, 0.08),
    "parameters": (parameters, 0.14),
    "headers": (headers, 0.12),
    "paths and methods": (another_path, 0.06),
    "broken HTTP": (no_http, 0.08),
}
