"""Short claims: what an operator reveals of a certificate that is kept for auditors.

Published radii help attackers to find the nearest change that fools a classifier (Cullen et al., ICML 2024). A short
claim says no more of the radius than which values of a fixed grid it reaches. It names the whole certificate, signed,
by its SHA-256, so that the operator cannot show another one later. That text holds a signature, which nobody without
the private key can guess, so its digest gives nothing away.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from macer_serve.errors import ParameterError
from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.canonical import canonical_json, plain_numbers
from macer_serve.smoothing.certificate import Certificate, confidence_of
from macer_serve.smoothing.noise import caveat_of

CLAIM_VERSION = 1
Reveal = Literal["bucket", "decision"]

_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("statement", "reveal", "bound", "noise", "policy", "key_id", "withheld"), (str,)),
    **dict.fromkeys(("radius", "alpha"), (float, int)),
    **dict.fromkeys(("model", "input"), (dict,)),
    "label": (str, type(None)),
    "class_id": (int, type(None)),
    "abstained": (bool,),
    "grid": (list, tuple),
    "asked": (float, int, type(None)),
    "version": (int,),
}


@dataclass(frozen=True, slots=True)
class ShortClaim:
    """A class with a value of the `grid` that its certified radius reaches, or an abstention.

    `radius` is the largest such value (`bucket`), or the `asked` one (`decision`); 0 if the radius reaches none. A
    decision against the asked value is an abstention. `withheld` is the digest of the whole certificate as a JWS.
    """

    statement: str
    reveal: str
    label: str | None
    class_id: int | None
    abstained: bool
    radius: float
    grid: tuple[float, ...]
    asked: float | None
    alpha: float
    bound: str
    noise: str
    model: dict[str, Any]
    input: dict[str, Any]
    policy: str
    key_id: str | None
    withheld: str
    version: int = CLAIM_VERSION

    @classmethod
    def of(cls, c: Certificate, jws: str, *, reveal: str, grid: tuple[float, ...], asked: float | None) -> ShortClaim:
        """Returns what is revealed of a certificate whose signed form is `jws`."""
        reached = [r for r in (grid if asked is None else (asked,)) if not c.abstained and c.radius >= r]
        hidden = c.abstained or (asked is not None and not reached)
        radius = max(reached, default=0.0)
        bound = c.plan["bound"]
        return cls(
            statement=claim_statement(hidden, radius, c.alpha, bound, c.noise),
            reveal=reveal,
            label=None if hidden else c.label,
            class_id=None if hidden else c.class_id,
            abstained=hidden,
            radius=radius,
            grid=grid,
            asked=asked,
            alpha=c.alpha,
            bound=bound,
            noise=c.noise,
            model=c.model,
            input=c.input,
            policy=c.policy,
            key_id=c.key_id,
            withheld=digest_of(jws.encode()),
        )

    @classmethod
    def from_json(cls, data: Any) -> ShortClaim:
        """Returns the claim that `to_json` wrote. Raises `ParameterError` for fields of another name or type."""
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != known:
            raise ParameterError(f"not a short claim of version {CLAIM_VERSION}: its fields are others")
        if wrong := [k for k, kinds in _KINDS.items() if type(data[k]) not in kinds]:
            raise ParameterError(f"not a short claim: {', '.join(wrong)} of another type than claims hold")
        if data["version"] != CLAIM_VERSION:
            raise ParameterError(f"short claim version {data['version']!r} is not understood")
        grid = tuple(data["grid"])
        if not all(type(r) in (float, int) for r in grid):
            raise ParameterError("not a short claim: grid must hold numbers")
        return cls(**{**data, "grid": grid})

    def to_json(self) -> dict[str, Any]:
        """Returns the claim as JSON values."""
        return {**asdict(self), "grid": list(self.grid)}

    def canonical(self) -> bytes:
        """Returns the bytes that are signed."""
        return canonical_json(plain_numbers(self.to_json()))


def claim_statement(abstained: bool, radius: float, alpha: float, bound: str, noise: str) -> str:
    """Returns what a short claim says, in one sentence."""
    if abstained:
        return "Nothing is claimed about this input."
    if not radius:
        words = "this is the smoothed classifier's class; no radius of the grid is certified."
        return f"With confidence {confidence_of(alpha)}, {words}"
    caveat = f", {words}," if (words := caveat_of(noise)) else ""
    return (
        f"With confidence {confidence_of(alpha)}, no change of L2 norm below {radius:g} to the model input (pixel "
        f"values in [0, 1]){caveat} changes the {bound_named(bound).adjective}smoothed classifier's class."
    )


def digest_of(data: bytes) -> str:
    """Returns `sha256:` and the digest of the bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
