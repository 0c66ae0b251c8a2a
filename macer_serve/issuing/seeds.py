"""Noise seeds that anybody with the issuer's public key can check, and nobody without the private key can predict.

The seed of an input is the hash of its seed proof, and the seed proof is the unique signature of the digests of the
input, the model and the policy. RFC 9381 defines such verifiable random functions. Its RSA-FDH-VRF (section 4)
also hashes a unique signature.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from macer_serve.errors import ParameterError

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SeedProof:
    """A 128-bit noise `seed`, and its proof: the signature in base64url, as certificates carry it.

    `text` is None for a seed that an evaluator chose.
    """

    text: str | None
    seed: bytes


def seed_message(thumbprint: bytes, *, input_digest: str, model_digest: str, policy_digest: str) -> bytes:
    """Returns the message whose signature is the seed proof.

    Digests are `sha256:` and 64 lower-case hexadecimal digits. The message begins with byte 00, which the signing input
    of a JWS never contains, so that no signature serves both uses. Raises `ParameterError` for other digests.
    """
    digests = digest_bytes(input_digest=input_digest, model_digest=model_digest, policy_digest=policy_digest)
    return b"\0macer-serve/seed/1\0" + thumbprint + digests


def digest_bytes(*, input_digest: str, model_digest: str, policy_digest: str) -> bytes:
    """Returns the 96 bytes of three digests. Raises `ParameterError` for a text that is no digest."""
    digests = {"input": input_digest, "model": model_digest, "policy": policy_digest}
    return b"".join(_bytes(text, name) for name, text in digests.items())


def seed_of(signature: bytes) -> bytes:
    """Returns the 16-byte noise seed that follows from a seed proof."""
    return hashlib.sha256(b"macer-serve/seed-of/1\0" + signature).digest()[:16]


def _bytes(digest: str, name: str) -> bytes:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ParameterError(f"the {name} digest must be sha256: and 64 lower-case hexadecimal digits")
    return bytes.fromhex(digest.removeprefix("sha256:"))
