"""The certificate: a self-contained record of what was proved, about which model and input, from which votes."""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from typing import Any

from macer_serve.errors import ParameterError
from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.canonical import canonical_json, plain_numbers
from macer_serve.smoothing.certification import Claim
from macer_serve.smoothing.noise import caveat_of
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import too_few_votes
from macer_serve.smoothing.votes import Record, from_record, shares

CERTIFICATE_VERSION = 3

# The JSON types of the fields. Votes are checked further by `from_record`, the plan by `Plan.from_json`.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("statement", "bound", "noise", "engine", "policy"), (str,)),
    **dict.fromkeys(("label", "reason", "stopped", "key_id", "seed_proof"), (str, type(None))),
    **dict.fromkeys(("radius", "upload_radius", "sigma", "alpha", "p_lower", "p_upper", "tau"), (float, int)),
    **dict.fromkeys(("n0", "n", "proof_n", "version"), (int,)),
    **dict.fromkeys(("votes", "selection_votes"), (list,)),
    "proof_votes": (list, type(None)),
    **dict.fromkeys(("plan", "model", "input", "fit"), (dict,)),
    "class_id": (int, type(None)),
    "abstained": (bool,),
}


@dataclass(frozen=True, slots=True, repr=False)
class Certificate:
    """One answer with its evidence. Nothing in it changes between two identical requests.

    Radii are L2, in pixel values in [0, 1], rounded down: `radius` at the model input, `upload_radius` at the
    decoded RGB pixels of the upload. `votes` are the `n` estimation votes per class, `selection_votes` the n0 selection
    votes. Soft votes are (level, count) pairs per class. The radius follows from the first `proof_n` of the estimation
    votes, `proof_votes`, which are None if they are the `votes`: the bounds of all looks hold together, and an earlier
    look may prove more than the last one.

    `policy` is the digest of what was fixed before the votes (`macer_serve.smoothing.policy`). `seed_proof` shows to
    whoever has the public key `key_id` that the noise seed belongs to this input, model and policy. Both are None if an
    evaluator chose the seed.
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
    votes: Record
    proof_n: int
    proof_votes: Record | None
    selection_votes: Record
    p_lower: float
    p_upper: float
    bound: str
    tau: float
    noise: str
    plan: dict[str, Any]
    model: dict[str, str]
    input: dict[str, Any]
    fit: dict[str, Any]
    engine: str
    policy: str
    key_id: str | None
    seed_proof: str | None
    version: int = CERTIFICATE_VERSION

    def __repr__(self) -> str:
        if self.abstained:
            return f"<Certificate: abstained, {self.reason}>"
        return (
            f"<Certificate: {self.label}, radius {self.radius:.6f}, upload radius {self.upload_radius:.6f}, "
            f"alpha {self.alpha:g}, {self.n:,} votes>"
        )

    def _repr_html_(self) -> str:
        """Returns the certificate as notebooks show it."""
        rows = {"class": self.label or "abstained", "radius": f"{self.radius:.6f}"}
        rows |= {"upload radius": f"{self.upload_radius:.6f}", "votes": f"{self.n:,}", "engine": self.engine}
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        words = html.escape(self.reason or self.statement)
        return f"<p>{words}</p><table>{cells}</table>"

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON values."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Any) -> Certificate:
        """Returns the record that `to_json` wrote.

        Raises `ParameterError` for fields that are missing, unknown or of another type.
        """
        if not isinstance(data, dict):
            raise ParameterError("a certificate is a JSON object")
        if "mac" in data:
            raise ParameterError("a certificate of an older form, signed by its issuer's secret: ask for a new one")
        known = {f.name for f in fields(cls)}
        wrong = sorted(known.symmetric_difference(data))
        if wrong:
            raise ParameterError(f"not a certificate of version {CERTIFICATE_VERSION}: check {', '.join(wrong)}")
        if data["version"] != CERTIFICATE_VERSION:
            raise ParameterError(f"certificate version {data['version']!r} is not understood")
        if wrong := [k for k, kinds in _KINDS.items() if type(data[k]) not in kinds]:
            raise ParameterError(f"not a certificate: {', '.join(wrong)} of another type than certificates hold")
        lists = ("votes", "proof_votes", "selection_votes")
        values: dict[str, Any] = {k: _frozen(v) if k in lists else v for k, v in data.items()}
        return cls(**values)

    def votes_by_class(self) -> tuple[int, ...]:
        """Returns the estimation votes of each class. Soft votes count as the class's share of n, rounded down."""
        votes = from_record(self.votes, soft=bound_named(self.plan["bound"]).soft)
        return tuple(votes.tolist()) if votes.ndim == 1 else tuple(int(s * self.n) for s in shares(votes))

    @property
    def selected(self) -> int:
        """The class that the selection votes chose, the only one that could be certified."""
        record = self.selection_votes if self.plan["mode"] == "certify" else self.votes
        return int(shares(from_record(record, soft=bound_named(self.plan["bound"]).soft)).argmax())

    def canonical(self) -> bytes:
        """Returns the bytes that are signed: every field, keys sorted, 1.0 as 1.

        JSON knows one kind of number, so that a record that went through JavaScript or jq is still the same record.
        """
        return canonical_json(plain_numbers(self.to_json()))


def ranked(certificate: Certificate, classes: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """Returns up to five classes that have votes, the most first: label, number and estimation votes."""
    votes = certificate.votes_by_class()
    order = sorted((c for c in range(len(classes)) if votes[c]), key=lambda c: -votes[c])
    return [(classes[c], c, votes[c]) for c in order[:5]]


def _frozen(value: Any) -> Any:
    """Returns the value with lists as tuples, at every depth."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def statement(claim: Claim, plan: Plan, noise: str) -> str:
    """Returns what is certified, in one sentence. `noise` names the stream."""
    if claim.abstained:
        return "Nothing is certified: the smoothed classifier abstains on this input."
    percent = 100 - 100 * Decimal(repr(float(plan.alpha)))  # every digit: never rounded up
    confidence = f"{percent:f}".rstrip("0").rstrip(".") + "%"
    if plan.mode == "predict":
        return f"With confidence {confidence}, this is the smoothed classifier's class; no radius is certified."
    caveat = f", {words}," if (words := caveat_of(noise)) else ""
    return (
        f"With confidence {confidence}, no change of L2 norm below {claim.radius:.6f} to the model input "
        f"(pixel values in [0, 1]){caveat} changes the {bound_named(plan.bound).adjective}smoothed classifier's class."
    )


def reason(claim: Claim, plan: Plan, classes: tuple[str, ...]) -> str | None:
    """Returns why the answer is an abstention, in words; None if it is not."""
    if not claim.abstained:
        return None
    if claim.stopped is not None and (too_few := too_few_votes(plan)):
        return too_few
    if claim.stopped in ("deadline", "cap"):
        why = "the deadline was reached" if claim.stopped == "deadline" else "the cap on votes was reached"
        fixed = "; the fixed plan proves nothing before its last vote" if plan.kind == "fixed" else ""
        return f"{why} after {claim.n:,} of {plan.n:,} votes{fixed}: allow more time or more votes"
    if claim.top_class is None or claim.stopped is None:
        return f"undecided: {claim.n:,} of {plan.n:,} votes are counted"
    share = shares(from_record(claim.votes, soft=plan.soft))
    first, *second = sorted(range(len(classes)), key=lambda c: -share[c])[:2]
    split = ", ".join(f"{classes[c]} {100 * share[c]:.1f} %" for c in (first, *second))
    if claim.stopped == "futility":
        return (
            f"a radius of {plan.radius:g} is out of reach, and {claim.n:,} votes ({split}) certify no smaller one: "
            "ask for less"
        )
    if plan.mode == "predict":
        return f"votes were split: {split}; the lead may be chance"
    holds = f"{math.floor(1000 * claim.p_lower) / 10:.1f} %"
    return (
        f"votes were split: {split}; {classes[claim.top_class]}, selected beforehand, is certain to hold only {holds} "
        f"of the noise{bound_named(plan.bound).shortfall(claim.p_upper)}"
    )
