"""The certificate: a self-contained record of what was proved, of which model and input, from which votes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from macer_serve.errors import ParameterError
from macer_serve.smoothing.certification import Claim
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.seeds import mac, mac_holds

CERTIFICATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Certificate:
    """One answer with its evidence; nothing in it changes between two identical requests.

    Radii are L2, in pixel values in [0, 1], rounded down: `radius` at the model input, `upload_radius` at the
    decoded RGB pixels of the upload. `votes` are the `n` estimation votes by class, `selection_votes` the n0.
    """

    statement: str
    label: str | None
    class_id: int | None
    abstained: bool
    radius: float
    upload_radius: float
    reason: str | None
    stopped: str | None
    sigma: float
    alpha: float
    n0: int
    n: int
    votes: tuple[int, ...]
    selection_votes: tuple[int, ...]
    p_lower: float
    bound: str
    tau: float
    noise: str
    plan: dict[str, Any]
    model: dict[str, str]
    input: dict[str, Any]
    fit: dict[str, Any]
    engine: str
    version: int = CERTIFICATE_VERSION
    mac: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Any) -> Certificate:
        """The record that `to_json` wrote; raises `ParameterError` where fields are missing or unknown."""
        if not isinstance(data, dict):
            raise ParameterError("a certificate is a JSON object")
        known = {f.name for f in fields(cls)}
        wrong = sorted(known.symmetric_difference(data))
        if wrong:
            raise ParameterError(f"not a certificate of version {CERTIFICATE_VERSION}: check {', '.join(wrong)}")
        if data["version"] != CERTIFICATE_VERSION:
            raise ParameterError(f"certificate version {data['version']!r} is not understood")
        lists = ("votes", "selection_votes")
        if wrong := [k for k in lists if not isinstance(data[k], list)]:
            raise ParameterError(f"not a certificate: {', '.join(wrong)} must be a list")
        if not isinstance(data["mac"], str | None):
            raise ParameterError("not a certificate: mac must be a string or null")
        values: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in data.items()}
        return cls(**values)

    def canonical(self) -> bytes:
        """The bytes that the mac covers: every field but the mac, keys sorted."""
        record = self.to_json()
        del record["mac"]
        return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
            errors="surrogatepass"  # a record from outside may hold lone surrogates: not authentic, but no crash
        )

    def signed(self, secret: bytes) -> Certificate:
        """This certificate with its mac."""
        return replace(self, mac=mac(secret, self.canonical()))

    def is_authentic(self, secret: bytes) -> bool:
        """Whether the mac is that of this record under the secret."""
        return self.mac is not None and mac_holds(secret, self.canonical(), self.mac)


def statement(claim: Claim, alpha: float, noise: str) -> str:
    """What is certified, in one sentence."""
    if claim.abstained:
        return "Nothing is certified: the smoothed classifier abstains on this input."
    confidence = f"{100 * (1 - alpha):.10g}%"
    exactly = "" if noise.startswith("exact") else ", up to floating-point error of the added noise,"
    return (
        f"With confidence {confidence}, no change of L2 norm below {claim.radius:.6f} to the model input "
        f"(pixel values in [0, 1]){exactly} changes the smoothed classifier's class."
    )


def reason(claim: Claim, plan: Plan, classes: tuple[str, ...]) -> str | None:
    """Why the answer is an abstention, in words; None where it is not."""
    if not claim.abstained:
        return None
    if claim.stopped in ("deadline", "cap"):
        why = "the deadline was reached" if claim.stopped == "deadline" else "the cap on votes was reached"
        return (
            f"{why} after {claim.n:,} of {plan.n:,} votes; the fixed plan proves nothing before its last vote: "
            "allow more time or more votes"
        )
    if claim.top_class is None or claim.n < plan.n:
        return f"undecided: {claim.n:,} of {plan.n:,} votes are counted"
    ranked = sorted(range(len(classes)), key=lambda c: -claim.votes[c])[:2]
    shares = ", ".join(f"{classes[c]} {100 * claim.votes[c] / claim.n:.1f} %" for c in ranked)
    return (
        f"votes were split: {shares}; {classes[claim.top_class]}, selected beforehand, is certain to hold only "
        f"{math.floor(1000 * claim.p_lower) / 10:.1f} % of the noise, and a certificate needs more than 50 %"
    )
