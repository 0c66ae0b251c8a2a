"""The image of a request: a multipart part `file`, or the raw body, never more bytes than allowed."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from macer_serve.errors import TooLargeError, UndecodableError, UnsupportedTypeError

RAW_TYPES = ("image/png", "image/jpeg", "image/webp")
# What multipart framing may add to the file itself.
_FRAMING = 64 * 1024

BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in RAW_TYPES},
        },
    }
}


async def read_image(request: Request, limit: int) -> bytes:
    """The uploaded bytes, undecoded.

    Raises `TooLargeError` as soon as more than `limit` bytes have come, `UnsupportedTypeError` for another
    content type, `UndecodableError` for multipart without a part `file`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    multipart = kind == "multipart/form-data"
    if not multipart and kind not in RAW_TYPES:
        raise UnsupportedTypeError(
            f"content type {kind or 'missing'!r} is not accepted: send multipart/form-data with a part 'file', "
            f"or the image itself as {', '.join(RAW_TYPES)}"
        )
    allowed = limit + (_FRAMING if multipart else 0)
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

    limited = Request(request.scope, counted)
    if not multipart:
        return await limited.body()
    try:
        async with limited.form(max_files=1, max_fields=8) as form:
            part = form.get("file")
            if not isinstance(part, UploadFile):
                raise UndecodableError("the multipart body has no file part named 'file'")
            return await part.read()
    except (MultiPartException, HTTPException) as error:
        detail = error.message if isinstance(error, MultiPartException) else error.detail
        raise UndecodableError(f"the multipart body cannot be read: {detail}") from error


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the upload has more than {limit:,} bytes; send a smaller image")
