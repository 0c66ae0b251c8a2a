"""Seeds that an evaluator chose, for evaluation logs and trials: repeatable, but neither signed nor bound to a key."""

from __future__ import annotations

import hashlib
import secrets
from typing import Protocol

from macer_serve.errors import ParameterError
from macer_serve.issuing.seeds import SeedProof, digest_bytes

MIN_SEED_BYTES = 16


class SeedSource(Protocol):
    """What a smoothed classifier needs of whoever issues its certificates: an `Issuer`, or an `EvaluationSeed`."""

    @property
    def key_id(self) -> str | None:
        """The name of the public key, None if there is none."""
        ...

    def seed_proof(self, *, input_digest: str, model_digest: str, policy_digest: str) -> SeedProof:
        """Returns the noise seed of an input under a model and a policy, always the same."""
        ...

    def sign(self, payload: bytes) -> str | None:
        """Returns a JWS of the payload, None if nothing is signed."""
        ...


class EvaluationSeed:
    """Seeds of all inputs from one value that the evaluator chose. Raises `ParameterError` for fewer than 16 bytes."""

    key_id = None

    def __init__(self, seed: bytes) -> None:
        if len(seed) < MIN_SEED_BYTES:
            raise ParameterError(f"an evaluation seed must have at least {MIN_SEED_BYTES} bytes, not {len(seed)}")
        self._seed = hashlib.sha256(b"macer-serve/evaluation-seed/1\0" + seed).digest()

    @classmethod
    def named(cls, name: str) -> EvaluationSeed:
        """Returns the seeds that a text stands for, as in `macer certify --seed NAME`."""
        return cls(hashlib.sha256(name.encode()).digest())

    @classmethod
    def random(cls) -> EvaluationSeed:
        """Returns seeds that nobody can predict or repeat."""
        return cls(secrets.token_bytes(32))

    def seed_proof(self, *, input_digest: str, model_digest: str, policy_digest: str) -> SeedProof:
        """Returns the noise seed of an input, without a proof. Raises `ParameterError` for malformed digests."""
        digests = digest_bytes(input_digest=input_digest, model_digest=model_digest, policy_digest=policy_digest)
        return SeedProof(None, hashlib.sha256(self._seed + digests).digest()[:16])

    def sign(self, payload: bytes) -> None:
        """Returns None: there is no key."""
        return
