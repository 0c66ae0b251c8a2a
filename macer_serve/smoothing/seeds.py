"""Seeds and macs, which are derived from the secret of whoever issues certificates."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from macer_serve.errors import ParameterError

MIN_SECRET_BYTES = 16


def new_secret() -> bytes:
    """Returns 256 fresh bits from the operating system."""
    return secrets.token_bytes(32)


def check_secret(secret: bytes) -> bytes:
    """Returns the secret itself. Raises `ParameterError` if it is too short to be unguessable."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ParameterError(f"the secret must have at least {MIN_SECRET_BYTES} bytes, not {len(secret)}")
    return secret


def read_secret(path: str | Path) -> bytes:
    """Returns the secret in a file, without spaces around. Raises `ParameterError` if it is unreadable or too short."""
    try:
        return check_secret(Path(path).read_bytes().strip())
    except (OSError, ParameterError) as error:
        raise ParameterError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def derive_seed(secret: bytes, input_digest: str, checkpoint_digest: str) -> bytes:
    """Returns the 128-bit noise seed of an input: unpredictable without the secret, the same for the same input.

    The plan is left out on purpose. Another n, alpha or stopping rule reads the same votes and is no second chance.
    """
    message = b"\0".join([b"seed", input_digest.encode(), checkpoint_digest.encode()])
    return hmac.new(secret, message, hashlib.sha256).digest()[:16]


def mac(secret: bytes, message: bytes) -> str:
    """Returns the mac of a certificate's canonical JSON, `hmac-sha256:...`."""
    return "hmac-sha256:" + hmac.new(secret, b"certificate\0" + message, hashlib.sha256).hexdigest()


def mac_holds(secret: bytes, message: bytes, claimed: str) -> bool:
    """Returns whether `claimed` is the mac of `message`, compared in constant time."""
    return hmac.compare_digest(mac(secret, message).encode(), claimed.encode(errors="surrogatepass"))
