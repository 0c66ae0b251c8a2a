"""The public side of RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, section 8.2), and the name of a key (RFC 7638).

The acceptance rule is written out here instead of taken from a library, because the guarantee needs that each message
has exactly one acceptable signature. `accepts` compares the whole encoding and parses nothing, so that no lax parser
can admit a second one.
"""

from __future__ import annotations

import hashlib

from macer_serve.issuing.base64url import encode_integer

PUBLIC_EXPONENT = 65537

# DER of the DigestInfo of a SHA-256 hash, with the NULL parameters (RFC 8017, section 9.2, note 1).
_DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


def width(n: int) -> int:
    """Returns the length of signatures under the modulus n, in bytes."""
    return (n.bit_length() + 7) // 8


def encoded(message: bytes, length: int) -> bytes:
    """Returns EMSA-PKCS1-v1_5 of a message, `length` bytes (RFC 8017, section 9.2)."""
    tail = b"\0" + _DIGEST_INFO + hashlib.sha256(message).digest()
    return b"\0\1" + b"\xff" * (length - 2 - len(tail)) + tail


def accepts(n: int, message: bytes, signature: bytes) -> bool:
    """Returns whether the signature of the message is valid under the modulus n.

    A signature s is valid if and only if it has as many bytes as n, s < n, and s^65537 mod n is the encoding of the
    message. If x -> x^65537 permutes the integers modulo n, exactly one s is valid.
    """
    length, s = width(n), int.from_bytes(signature, "big")
    if len(signature) != length or s >= n:
        return False
    return pow(s, PUBLIC_EXPONENT, n).to_bytes(length, "big") == encoded(message, length)


def thumbprint(n: int) -> bytes:
    """Returns the SHA-256 thumbprint of the public key with modulus n, 32 bytes (RFC 7638, section 3)."""
    exponent = encode_integer(PUBLIC_EXPONENT)
    return hashlib.sha256(f'{{"e":"{exponent}","kty":"RSA","n":"{encode_integer(n)}"}}'.encode()).digest()
