"""Seeds and macs: what a server's secret is used for, each use under a key of its own."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from macer_serve.errors import ParameterError

MIN_SECRET_BYTES = 16


def new_secret() -> bytes:
    """256 fresh bits from the operating system."""
    return secrets.token_bytes(32)


def check_secret(secret: bytes) -> bytes:
    """The secret itself; raises `ParameterError` where it is too short to be unguessable."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ParameterError(f"the secret must have at least {MIN_SECRET_BYTES} bytes, not {len(secret)}")
    return secret


def derive_seed(secret: bytes, input_digest: str, checkpoint_digest: str) -> bytes:
    """The 128-bit noise seed of an input: unpredictable without the secret, the same for the same input.

    The plan is left out on purpose: another n, alpha or stopping rule reads the same votes, and buys no redraw.
    """
    message = b"\0".join([b"seed", input_digest.encode(), checkpoint_digest.encode()])
    return hmac.new(secret, message, hashlib.sha256).digest()[:16]


def mac(secret: bytes, message: bytes) -> str:
    """`hmac-sha256:...` of a certificate's canonical JSON."""
    return "hmac-sha256:" + hmac.new(secret, b"certificate\0" + message, hashlib.sha256).hexdigest()


def mac_holds(secret: bytes, message: bytes, claimed: str) -> bool:
    """Whether `claimed` is the mac of `message`, compared in constant time."""
    return hmac.compare_digest(mac(secret, message).encode(), claimed.encode(errors="surrogatepass"))
