"""Signed records in JWS compact serialization (RFC 7515, section 7.1): header.payload.signature.

The header has one form, byte for byte. It names RS256 (RFC 7518, section 3.3), the key and the type of the payload, and
nothing else. So the header offers no choice of an algorithm, no `crit`, no key and no address, and no JSON is parsed
before the signature is checked. Explicit types keep records of different kinds apart (RFC 8725, section 3.11).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from macer_serve.errors import ParameterError
from macer_serve.issuing.base64url import decode, encode

CERTIFICATE = "macer-certificate+jws"  # a whole certificate
CLAIM = "macer-claim+jws"  # what an operator reveals of a certificate that is kept for auditors
TYPES = (CERTIFICATE, CLAIM)

MAX_CHARACTERS = 16 * 2**20

_HEADER = re.compile(rb'\{"alg":"RS256","kid":"([A-Za-z0-9_-]{43})","typ":"([A-Za-z0-9+-]{1,64})"\}')


@dataclass(frozen=True, slots=True)
class Parts:
    """A JWS taken apart; nothing in it is checked against a key yet."""

    kid: str
    typ: str
    payload: bytes
    signing_input: bytes
    signature: bytes


def signing_input(payload: bytes, *, kid: str, typ: str) -> bytes:
    """Returns the bytes that are signed. Raises `ParameterError` for an unknown type or a payload that is too large."""
    if typ not in TYPES:
        raise ParameterError(f"a signed record's type must be one of {', '.join(TYPES)}")
    header = f'{{"alg":"RS256","kid":"{kid}","typ":"{typ}"}}'.encode()
    text = f"{encode(header)}.{encode(payload)}".encode()
    if not payload or len(text) > MAX_CHARACTERS - 1024:  # 4,096 bits of signature take 683 characters
        raise ParameterError(f"a signed record must have 1 to {(MAX_CHARACTERS - 1024) * 3 // 4:,} bytes")
    return text


def take_apart(jws: str) -> Parts:
    """Returns the parts of a JWS. Raises `ParameterError` for a text that `signing_input` cannot have begun."""
    if not isinstance(jws, str) or len(jws) > MAX_CHARACTERS:
        raise ParameterError(f"not a signed record: it must be a text of at most {MAX_CHARACTERS:,} characters")
    if jws.count(".") != 2:
        raise ParameterError("not a signed record: it must have three parts, separated by two full stops")
    header, payload, signature = jws.split(".")
    match = _HEADER.fullmatch(decode(header, "the header of the signed record"))
    if match is None:
        raise ParameterError('not a signed record: its header must be {"alg":"RS256","kid":"...","typ":"..."} exactly')
    if not payload:
        raise ParameterError("not a signed record: its payload is empty")
    return Parts(
        kid=match[1].decode(),
        typ=match[2].decode(),
        payload=decode(payload, "the payload of the signed record"),
        signing_input=f"{header}.{payload}".encode(),
        signature=decode(signature, "the signature of the signed record"),
    )
