"""Uploads that a server must refuse: each is a request, and every answer of 4xx but 429 is right."""

from __future__ import annotations

import json
import random
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Hostile:
    """A request that must be refused, as keyword arguments of `aiohttp.ClientSession.post`."""

    name: str
    body: bytes
    kind: str = "image/png"
    parameters: dict[str, str] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        return {"data": self.body, "headers": {"Content-Type": self.kind}, "params": self.parameters}


def _part(name: str, body: bytes, more: str = "") -> bytes:
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode()
    return head + body + b"\r\n"


def _png_of(width: int, height: int) -> bytes:
    """Returns a PNG file that claims a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def hostile_upload(generator: random.Random, image: bytes) -> Hostile:
    """Returns a random request that must be refused, made of a good image."""
    form = "multipart/form-data; boundary=B"
    file = '; filename="x.png"'
    end = b"--B--\r\n"
    noise = generator.randbytes(generator.randrange(1, 5000))
    good = {"n": "300"}
    return generator.choice(
        [
            Hostile("nothing", b""),
            Hostile("noise", noise),
            Hostile("cut short", image[: generator.randrange(1, len(image) // 2)]),
            Hostile("a bomb", _png_of(60_000, 60_000)),
            Hostile("no width", _png_of(0, 10)),
            Hostile("too large", bytes(11 * 2**20)),
            Hostile("text", b"hello", "text/plain"),
            Hostile("a form of the web", b"a=b", "application/x-www-form-urlencoded"),
            Hostile("no part", end, form),
            Hostile("a field", _part("file", b"x") + end, form),
            Hostile("two files", 2 * _part("file", image, file) + end, form),
            Hostile("a field beside the file", _part("file", image, file) + _part("n", b"5") + end, form),
            Hostile("no end", _part("file", noise, file), form),
            Hostile("a charset", _part("a", b"x") + end, f"{form}; charset=undefined"),
            Hostile("no boundary", _part("file", image, file) + end, "multipart/form-data"),
            Hostile("not JSON", noise, "application/json"),
            Hostile("deep JSON", b"[" * 100_000, "application/json"),
            Hostile("a list", json.dumps({"image": ["a", "b"]}).encode(), "application/json"),
            Hostile("not base64", json.dumps({"image": "*"}).encode(), "application/json"),
            Hostile("no such model", image, parameters={"model": "nobody"}),
            Hostile("n of nothing", image, parameters={"n": "0"}),
            Hostile("n of millions", image, parameters={"n": "100000000"}),
            Hostile("n in words", image, parameters={"n": "many"}),
            Hostile("alpha of one", image, parameters={"alpha": "1"}),
            Hostile("alpha of nan", image, parameters={"alpha": "nan"}),
            Hostile("two plans", image, parameters={"radius": "0.1", "tolerance": "0.1"}),
            Hostile("no such parameter", image, parameters={"sigma": "1"}),
            Hostile("a long deadline", image, parameters={"timeout_s": "100000", **good}),
        ]
    )
