"""The issuer's public key: what an auditor needs to check seeds and signatures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from macer_serve.errors import IssuerKeyError, OtherKeyError, ParameterError, SignatureError
from macer_serve.issuing.base64url import decode, decode_integer, encode, encode_integer
from macer_serve.issuing.jws import CERTIFICATE, Parts, take_apart
from macer_serve.issuing.permutation import ROOTS, fault
from macer_serve.issuing.rsa import PUBLIC_EXPONENT, accepts, thumbprint, width
from macer_serve.issuing.seeds import seed_message, seed_of

MIN_BITS, MAX_BITS = 3072, 4096  # 128 bits of security (NIST SP 800-57); longer keys make checks of proofs slow

# Members of a JWK beside those of RFC 7517 and RFC 7518.
PROOF, RETIRED = "macer_permutation_proof", "macer_retired"
_FIXED = {"kty": "RSA", "use": "sig", "alg": "RS256", "e": encode_integer(PUBLIC_EXPONENT)}


@dataclass(frozen=True, slots=True, repr=False)
class IssuerKey:
    """A public RSA key with modulus `n` and its permutation proof. Every instance has passed all checks.

    `retired` keys sign nothing new. Raises `IssuerKeyError` for a key that is too short, too long, even, has a small
    factor, or whose proof does not hold.
    """

    n: int
    proof: tuple[int, ...]
    retired: bool = False

    def __post_init__(self) -> None:
        bits = self.n.bit_length()
        if not MIN_BITS <= bits <= MAX_BITS:
            raise IssuerKeyError(
                f"a key must have {MIN_BITS} to {MAX_BITS} bits, not {bits}: make one with macer key new"
            )
        if found := fault(self.n, self.proof):
            raise IssuerKeyError(f"the key is refused: {found}")

    def __repr__(self) -> str:
        return f"<IssuerKey: {self.n.bit_length()} bits, {self.kid}{', retired' if self.retired else ''}>"

    @property
    def kid(self) -> str:
        """Returns the RFC 7638 thumbprint in base64url, 43 characters: the `key_id` of certificates."""
        return encode(thumbprint(self.n))

    def seed(self, proof: str, *, input_digest: str, model_digest: str, policy_digest: str) -> bytes:
        """Returns the 16-byte noise seed that follows from a seed proof in base64url.

        Raises `ParameterError` for malformed digests or base64url, `SignatureError` if the proof is not this key's
        for these digests.
        """
        message = seed_message(
            thumbprint(self.n), input_digest=input_digest, model_digest=model_digest, policy_digest=policy_digest
        )
        signature = decode(proof, "the seed proof")
        if not accepts(self.n, message, signature):
            raise SignatureError("the seed proof is not this key's for this input, model and policy")
        return seed_of(signature)

    def payload(self, jws: str, typ: str = CERTIFICATE) -> bytes:
        """Returns the payload of a JWS that this key signed.

        Raises `ParameterError` for a text that is not a JWS of this type, `OtherKeyError` if it names another key,
        `SignatureError` if the signature does not hold.
        """
        parts = take_apart(jws)
        if parts.kid != self.kid:
            raise OtherKeyError(f"issued under another key: {parts.kid}, not {self.kid}")
        return self.signed(parts, typ)

    def signed(self, parts: Parts, typ: str) -> bytes:
        """Returns the payload of a JWS taken apart. Raises as `payload` does."""
        if parts.typ != typ:
            raise ParameterError(f"the signed record is of the type {parts.typ}, not {typ}")
        if not accepts(self.n, parts.signing_input, parts.signature):
            raise SignatureError("the signature does not hold: the record was changed, or this key never signed it")
        return parts.payload

    def to_jwk(self) -> dict[str, Any]:
        """Returns the key as a JWK (RFC 7517) with the permutation proof."""
        return jwk_of(self.n, self.proof, self.retired)

    def to_pem(self) -> str:
        """Returns the key as PEM (RFC 7468), as openssl reads it: without the permutation proof."""
        public = RSAPublicNumbers(PUBLIC_EXPONENT, self.n).public_key()
        return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    @classmethod
    def from_jwk(cls, jwk: dict[str, Any]) -> IssuerKey:
        """Returns the key in a JWK. Raises `IssuerKeyError`."""
        return cls(*numbers_of(jwk))


def jwk_of(n: int, proof: tuple[int, ...], retired: bool) -> dict[str, Any]:
    """Returns the JWK of a modulus and its proof. The roots have the width of n."""
    return {
        **_FIXED,
        "kid": encode(thumbprint(n)),
        "n": encode_integer(n),
        PROOF: [encode(root.to_bytes(width(n), "big")) for root in proof],
        **({RETIRED: True} if retired else {}),
    }


def numbers_of(jwk: dict[str, Any]) -> tuple[int, tuple[int, ...], bool]:
    """Returns modulus, proof and whether the key is retired. The numbers themselves are not checked yet.

    Unknown members are ignored, as RFC 7517 demands. Raises `IssuerKeyError` for members that are missing or malformed.
    """
    for name, value in _FIXED.items():
        if jwk.get(name) != value:
            raise IssuerKeyError(f'a key must have "{name}": "{value}"; {_shown(jwk.get(name))} is refused')
    proof, retired = jwk.get(PROOF), jwk.get(RETIRED, False)
    if not isinstance(proof, list):
        raise IssuerKeyError(f"the key has no permutation proof ({PROOF}): its issuer could choose among seeds")
    if len(proof) != ROOTS or not isinstance(retired, bool):
        raise IssuerKeyError(f"{PROOF} must have {ROOTS} roots, and {RETIRED} must be true or false")
    try:
        n = decode_integer(jwk.get("n", ""), "n")
        if n.bit_length() > MAX_BITS:
            raise IssuerKeyError(f"a key must have {MIN_BITS} to {MAX_BITS} bits, not {n.bit_length()}")
        roots = tuple(_root(text, width(n)) for text in proof)
    except ParameterError as error:
        raise IssuerKeyError(f"the key is malformed: {error}") from None
    if jwk.get("kid") != encode(thumbprint(n)):
        raise IssuerKeyError(f"the key's kid must be its RFC 7638 thumbprint, {encode(thumbprint(n))}")
    return n, roots, retired


def _root(text: str, length: int) -> int:
    if len(data := decode(text, "a root of the proof")) != length:
        raise ParameterError(f"a root of the proof must have {length} bytes, not {len(data)}")
    return int.from_bytes(data, "big")


def _shown(value: object) -> str:
    return ascii(value)[:60]
