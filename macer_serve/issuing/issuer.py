"""The issuer: whoever holds the private key that makes seeds and signs certificates."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256

from macer_serve.errors import IssuerKeyError, ParameterError, first_line
from macer_serve.issuing.base64url import decode_integer, encode, encode_integer
from macer_serve.issuing.jws import CERTIFICATE, signing_input
from macer_serve.issuing.key_files import others_can_read, read, write_new
from macer_serve.issuing.key_set import KeySet, jwks_in
from macer_serve.issuing.keys import MIN_BITS, RETIRED, IssuerKey, jwk_of, numbers_of
from macer_serve.issuing.permutation import prove
from macer_serve.issuing.rsa import PUBLIC_EXPONENT, thumbprint
from macer_serve.issuing.seeds import SeedProof, seed_message, seed_of

log = logging.getLogger(__name__)


class Issuer:
    """A private RSA key with its public form `key` and the issuer's `keys`, present and retired.

    Signatures are made by the `cryptography` package, which blinds the private key and lets other Python threads run.
    """

    def __init__(self, private: rsa.RSAPrivateKey, key: IssuerKey, retired: list[dict[str, Any]]) -> None:
        """Meant for `new`, `read` and `load`. Raises `IssuerKeyError` if the private key is not that of `key`."""
        if private.public_key().public_numbers() != rsa.RSAPublicNumbers(PUBLIC_EXPONENT, key.n):
            raise IssuerKeyError("the private key is not that of the public key")
        if key.retired:
            raise IssuerKeyError("a retired key signs nothing: make a new one with macer key new")
        self._private = private
        self.key = key
        self.keys = KeySet([key.to_jwk(), *retired])

    def __repr__(self) -> str:
        return f"<Issuer: {self.key.kid}>"  # never the private key

    @classmethod
    def new(cls, bits: int = MIN_BITS, *, retired: KeySet | None = None) -> Issuer:
        """Returns an issuer with a fresh key; all keys of `retired` stay in its key set, marked."""
        private = rsa.generate_private_key(PUBLIC_EXPONENT, bits)
        numbers = private.private_numbers()
        key = IssuerKey(numbers.public_numbers.n, prove(numbers.p, numbers.q))
        return cls(private, key, retired.retired() if retired else [])

    @classmethod
    def read(cls, text: str | bytes) -> Issuer:
        """Returns the issuer in the text of a key file: a JWK Set with one private key, and retired public keys.

        Raises `IssuerKeyError` for any other text, and for a key or proof that does not hold.
        """
        jwks = jwks_in(text)
        private = [jwk for jwk in jwks if "d" in jwk]
        if len(private) != 1:
            raise IssuerKeyError(
                f"a key file must hold one private key, not {len(private)}: make it with macer key new"
            )
        others = [numbers_of(jwk) for jwk in jwks if "d" not in jwk]
        if not all(retired for _, _, retired in others):
            raise IssuerKeyError(f"the other keys of a key file must be marked as retired: {RETIRED}")
        return cls(_private_key(private[0]), IssuerKey.from_jwk(private[0]), [jwk_of(*other) for other in others])

    @classmethod
    def load(cls, path: str | Path) -> Issuer:
        """Returns the issuer in a key file. Raises `IssuerKeyError`."""
        if others_can_read(Path(path)):
            log.warning("%s can be read by other users: chmod 600 keeps the key to its owner", path)
        return cls.read(read(Path(path)))

    def save(self, path: str | Path) -> None:
        """Write a new key file, readable by its owner alone. Raises `IssuerKeyError` if the file exists."""
        write_new(Path(path), self.to_key_file())

    def to_key_file(self) -> str:
        """Returns the text of the key file, private key included, which `read` reads."""
        numbers = self._private.private_numbers()
        members = {"d": numbers.d, "p": numbers.p, "q": numbers.q}
        members |= {"dp": numbers.dmp1, "dq": numbers.dmq1, "qi": numbers.iqmp}
        secret = {name: encode_integer(value) for name, value in members.items()}
        keys = [{**self.key.to_jwk(), **secret}, *json.loads(self.keys.to_json())["keys"][1:]]
        return json.dumps({"keys": keys}, indent=1) + "\n"

    @property
    def key_id(self) -> str:
        """The name of the public key, as certificates carry it."""
        return self.key.kid

    def seed_proof(self, *, input_digest: str, model_digest: str, policy_digest: str) -> SeedProof:
        """Returns the seed of an input under a model and a policy, with its proof. Raises `ParameterError`."""
        message = seed_message(
            thumbprint(self.key.n), input_digest=input_digest, model_digest=model_digest, policy_digest=policy_digest
        )
        signature = self._signature(message)
        return SeedProof(encode(signature), seed_of(signature))

    def sign(self, payload: bytes, typ: str = CERTIFICATE) -> str:
        """Returns a JWS in compact serialization, always the same for the same payload. Raises `ParameterError`."""
        text = signing_input(payload, kid=self.key.kid, typ=typ)
        return f"{text.decode()}.{encode(self._signature(text))}"

    def _signature(self, message: bytes) -> bytes:
        return self._private.sign(message, PKCS1v15(), SHA256())


def public_keys(text: str | bytes) -> KeySet:
    """Returns the public keys of a key file or of a JWKS document. Raises `IssuerKeyError`."""
    private = any("d" in jwk for jwk in jwks_in(text))
    return Issuer.read(text).keys if private else KeySet.read(text)


def _private_key(jwk: dict[str, Any]) -> rsa.RSAPrivateKey:
    """Returns the private key of a JWK (RFC 7518, section 6.3.2), whose numbers the library checks."""
    try:
        d, p, q, dp, dq, qi, n = (decode_integer(jwk.get(x, ""), x) for x in ("d", "p", "q", "dp", "dq", "qi", "n"))
        public = rsa.RSAPublicNumbers(PUBLIC_EXPONENT, n)
        return rsa.RSAPrivateNumbers(p, q, d, dp, dq, qi, public).private_key()
    except (ParameterError, ValueError) as error:
        raise IssuerKeyError(f"the private key is malformed: {first_line(error)}") from None
