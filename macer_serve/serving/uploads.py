"""The image of a request: a multipart part `file`, the raw body, or base64 in JSON, never more bytes than allowed."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import MutableMapping
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from macer_serve.errors import ParameterError, TooLargeError, UndecodableError, UnsupportedTypeError
from macer_serve.serving.problems import SeveralImagesError

MULTIPART, JSON, BYTES = "multipart/form-data", "application/json", "application/octet-stream"
# What multipart framing or JSON may add to the file itself.
_FRAMING = 64 * 1024
_FIELDS = 16  # parts of a multipart body that are read before it is refused
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{1,70}(?<! )")  # RFC 2046, 5.1.1
_STRUCTURE = 1000  # brackets, braces and commas of a JSON body: an image is one text
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")
_HOW = 'send multipart/form-data with a part \'file\', the image itself as image/png, or JSON {"image": "<base64>"}'


async def read_image(request: Request, limit: int) -> bytes:
    """Returns the uploaded bytes, undecoded. What kind of image they are is for the decoder to find out.

    Raises `TooLargeError` as soon as more than `limit` bytes have come, `UnsupportedTypeError` for another content
    type, `SeveralImagesError` for more than one file, `ParameterError` for a field that is not the image, and
    `UndecodableError` for a body that cannot be read or holds no image.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == MULTIPART:
        return await _multipart(_limited(request, limit, limit + _FRAMING))
    if kind == JSON:
        body = await _limited(request, limit, _base64_size(limit) + _FRAMING).body()
        return _from_json(body, limit)
    if kind in ("", BYTES) or kind.startswith("image/"):
        return await _limited(request, limit, limit).body()
    hint = ""
    if kind == "application/x-www-form-urlencoded":
        hint = ". curl sends this type unless -H 'Content-Type: image/png' is given; curl -F file=@IMAGE works, too"
    raise UnsupportedTypeError(f"content type {kind!r} is not accepted: {_HOW}{hint}")


def _limited(request: Request, limit: int, allowed: int) -> Request:
    """Returns the request with a body that raises `TooLargeError` after `allowed` bytes.

    Raises it at once if more are declared.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > allowed:
        raise _too_large(limit)
    received = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > allowed:
            raise _too_large(limit)
        return message

    return Request(request.scope, counted)


async def _multipart(request: Request) -> bytes:
    """Returns the part `file` of a multipart body. Its names are UTF-8, whatever charset the client declares."""
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if not _BOUNDARY.fullmatch(boundary):
        raise UndecodableError("the multipart body cannot be read: its content type declares no valid boundary")
    headers = Headers({"content-type": f'{MULTIPART}; boundary="{boundary}"'})
    parser = MultiPartParser(headers, request.stream(), max_files=_FIELDS, max_fields=_FIELDS)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise UndecodableError(f"the multipart body cannot be read: {error.message}") from error
    try:
        return await _the_file(form).read()
    finally:
        await form.close()


def _the_file(form: FormData) -> UploadFile:
    parts = form.multi_items()
    files = [part for name, part in parts if name == "file" and isinstance(part, UploadFile)]
    if len(files) > 1:
        raise SeveralImagesError(
            f"the request holds {len(files)} files, and an answer is about one image: send a request for each"
        )
    if not files:
        raise UndecodableError(f"the multipart body has no file part named 'file'{_instead(parts)}")
    if others := sorted({name for name, part in parts if part is not files[0]}):
        raise ParameterError(
            f"unknown form field {_shown(others)}: parameters belong into the query, as in /predict?n=1000"
        )
    return files[0]


def _instead(parts: list[tuple[str, Any]]) -> str:
    """Returns what the body has in place of the file, in words."""
    return f", only {_shown(sorted({name for name, _ in parts}))}" if parts else ""


def _shown(names: list[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:5])


def _from_json(body: bytes, limit: int) -> bytes:
    if sum(map(body.count, (b"[", b"{", b","))) > _STRUCTURE:  # would be minutes of parsing and gigabytes of objects
        raise UndecodableError(f"the JSON body holds more than an image: {_HOW}")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UndecodableError(f"the body is not JSON: {_HOW}") from error
    if not isinstance(document, dict) or "image" not in document:
        raise UndecodableError(f"the JSON body has no member 'image': {_HOW}")
    if others := sorted(set(document) - {"image"}):
        raise ParameterError(
            f"unknown JSON member {_shown(others)}: parameters belong into the query, as in /predict?n=1000"
        )
    image = document["image"]
    if isinstance(image, list):
        raise SeveralImagesError("image is a list, and an answer is about one image: send a request for each")
    if not isinstance(image, str):
        raise UndecodableError("image must be text, the file in base64")
    try:
        data = base64.b64decode(_DATA_URL.sub("", image[:200], count=1) + image[200:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UndecodableError(f"image is not base64: {error}") from error
    if len(data) > limit:
        raise _too_large(limit)
    return data


def _base64_size(size: int) -> int:
    return 4 * ((size + 2) // 3)


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the upload has more than {limit:,} bytes; send a smaller image")
