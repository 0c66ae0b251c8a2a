"""Base64url without padding (RFC 7515, section 2), read strictly: one text per value.

A lax reader accepts several texts for the same bytes: with padding, with white space, or with other unused bits at the
end. This reader accepts only the text that `encode` writes.
"""

from __future__ import annotations

import base64
import binascii
import re

from macer_serve.errors import ParameterError

_ALPHABET = re.compile(r"[A-Za-z0-9_-]*")


def encode(data: bytes) -> str:
    """Returns the bytes as base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str, name: str) -> bytes:
    """Returns the bytes that `encode` writes as `text`. Raises `ParameterError`, which calls the text `name`."""
    if not isinstance(text, str) or not _ALPHABET.fullmatch(text):
        raise ParameterError(f"{name} is not base64url without padding")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:  # a length that no bytes have
        raise ParameterError(f"{name} is not base64url without padding") from None
    if encode(data) != text:
        raise ParameterError(f"{name} is not the canonical base64url of its bytes: unused bits at its end are set")
    return data


def encode_integer(value: int) -> str:
    """Returns a positive integer as Base64urlUInt: big-endian, in the fewest octets (RFC 7518, section 2)."""
    return encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def decode_integer(text: str, name: str) -> int:
    """Returns the positive integer that `encode_integer` writes as `text`. Raises `ParameterError`."""
    data = decode(text, name)
    if not data or data[0] == 0:
        raise ParameterError(f"{name} is not a positive integer without leading zeros")
    return int.from_bytes(data, "big")
