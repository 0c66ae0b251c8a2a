"""Who issues certificates, and how anybody checks that: seeds that the issuer cannot choose, and signatures.

    issuer = Issuer.load("issuer.key")                    # made by: macer key new issuer.key
    proof = issuer.seed_proof(input_digest=..., model_digest=..., policy_digest=...)
    jws = issuer.sign(certificate_bytes)

    keys = KeySet.read(Path("issuer.jwks").read_bytes())  # the auditor has the public keys alone
    signed = keys.open(jws)                               # raises unless a key of the set signed it
    seed = signed.key.seed(proof.text, input_digest=..., model_digest=..., policy_digest=...)

The key is RSA. Its signatures (RSASSA-PKCS1-v1_5) are unique per message, given the permutation proof that each key
carries; so an input has one seed, and the issuer cannot look for a better one. Neither seeds nor signatures depend on
anything but the key and what is signed.
"""

from __future__ import annotations

from macer_serve.issuing.evaluation_seeds import EvaluationSeed, SeedSource
from macer_serve.issuing.issuer import Issuer
from macer_serve.issuing.jws import CERTIFICATE, CLAIM
from macer_serve.issuing.key_set import KeySet, Signed
from macer_serve.issuing.keys import IssuerKey
from macer_serve.issuing.seeds import SeedProof

__all__ = [
    "CERTIFICATE",
    "CLAIM",
    "EvaluationSeed",
    "Issuer",
    "IssuerKey",
    "KeySet",
    "SeedProof",
    "SeedSource",
    "Signed",
]
