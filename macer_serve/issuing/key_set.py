"""The public keys of an issuer, present and retired, as a JWK Set (RFC 7517, section 5)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from macer_serve.errors import IssuerKeyError, OtherKeyError
from macer_serve.issuing.documents import read_object
from macer_serve.issuing.jws import CERTIFICATE, take_apart
from macer_serve.issuing.keys import IssuerKey, jwk_of, numbers_of

MAX_KEYS = 16
PRIVATE_MEMBERS = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
_KID = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Signed:
    """The payload of a JWS whose signature holds, and the key that signed it."""

    payload: bytes
    key: IssuerKey


class KeySet:
    """Public keys by kid. A key is checked, and its permutation proof with it, when it is first asked for."""

    def __init__(self, jwks: list[dict[str, Any]]) -> None:
        """Takes JWKs in any order. Raises `IssuerKeyError` for private keys, repeated or malformed kids."""
        if not 1 <= len(jwks) <= MAX_KEYS:
            raise IssuerKeyError(f"a key set must have 1 to {MAX_KEYS} keys, not {len(jwks)}")
        self._jwks: dict[str, dict[str, Any]] = {}
        for jwk in jwks:
            if any(name in jwk for name in PRIVATE_MEMBERS):
                raise IssuerKeyError("this key set holds a private key: publish the output of macer key public instead")
            kid = jwk.get("kid")
            if not isinstance(kid, str) or not _KID.fullmatch(kid):
                raise IssuerKeyError("each key of a key set must have a kid of 43 base64url characters")
            if kid in self._jwks:
                raise IssuerKeyError(f"the key set holds the key {kid} twice")
            self._jwks[kid] = jwk

    @classmethod
    def read(cls, text: str | bytes) -> KeySet:
        """Returns the key set in a JWKS document. Raises `IssuerKeyError`."""
        return cls(jwks_in(text))

    def __len__(self) -> int:
        return len(self._jwks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._jwks)

    def __getitem__(self, kid: str) -> IssuerKey:
        """Returns the key. Raises `OtherKeyError` if the set does not hold it, `IssuerKeyError` if it is refused."""
        if kid not in self._jwks:
            raise OtherKeyError(f"issued under another key: {ascii(kid)[1:-1][:60]} is not in the key set")
        return IssuerKey.from_jwk(self._jwks[kid])

    def open(self, jws: str, typ: str = CERTIFICATE) -> Signed:
        """Returns the payload of a JWS, signed by a key of the set. Raises as `IssuerKey.payload` does."""
        parts = take_apart(jws)
        key = self[parts.kid]
        return Signed(key.signed(parts, typ), key)

    def retired(self) -> list[dict[str, Any]]:
        """Returns the JWKs of all keys of the set, marked as retired."""
        return [jwk_of(n, proof, True) for n, proof, _ in map(numbers_of, self._jwks.values())]

    def to_json(self) -> str:
        """Returns the JWKS document. It holds no members but those that this project knows."""
        return json.dumps({"keys": [jwk_of(*numbers_of(jwk)) for jwk in self._jwks.values()]}, indent=1) + "\n"


def jwks_in(text: str | bytes) -> list[dict[str, Any]]:
    """Returns the JWKs of a document, public or private. Raises `IssuerKeyError` for a document of another form."""
    keys = read_object(text).get("keys")
    if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
        raise IssuerKeyError('not a key set: it must be {"keys": [...]} with an object per key')
    return keys
