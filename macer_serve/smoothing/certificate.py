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

CERTIFICATE_VERSION = 4

# The JSON types of the fields. Votes are checked further by `from_record`, the plan by `Plan.from_json`.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("statement", "bound", "noise", "engine", "policy"), (str,)),
    **dict.fromkeys(("label", "group", "reason", "stopped", "key_id", "seed_proof"), (str, type(None))),
    **dict.fromkeys(("radius", "upload_radius", "group_radius", "group_upload_radius"), (float, int)),
    **dict.fromkeys(("sigma", "alpha", "p_lower", "p_upper", "tau"), (float, int)),
    **dict.fromkeys(("level", "n0", "n", "proof_n", "version"), (int,)),
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

    `level` says what the selection votes chose: 0 a class, above 0 a group of that level of the plan's hierarchy. A
    coarse answer names a certified `group` with its radii, and no class. For whoever
    asks for a class it is an abstention: `label` and `class_id` are None, `abstained` is true, and `radius` and
    `upload_radius` are 0.

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
    level: int
    group: str | None
    group_radius: float
    group_upload_radius: float
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
        if self.group is not None:
            return (
                f"<Certificate: no class, but group {self.group}, radius {self.group_radius:.6f}, "
                f"upload radius {self.group_upload_radius:.6f}, alpha {self.alpha:g}, {self.n:,} votes>"
            )
        if self.abstained:
            return f"<Certificate: abstained, {self.reason}>"
        return (
            f"<Certificate: {self.label}, radius {self.radius:.6f}, upload radius {self.upload_radius:.6f}, "
            f"alpha {self.alpha:g}, {self.n:,} votes>"
        )

    def _repr_html_(self) -> str:
        """Returns the certificate as notebooks show it."""
        rows = {"class": self.label or "abstained", "radius": f"{self.radius:.6f}"}
        rows |= {"upload radius": f"{self.upload_radius:.6f}"}
        if self.group is not None:
            rows = {"group": self.group, "radius": f"{self.group_radius:.6f}"}
            rows |= {"upload radius": f"{self.group_upload_radius:.6f}"}
        rows |= {"votes": f"{self.n:,}", "engine": self.engine}
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        words = html.escape(self.statement if self.group is not None else self.reason or self.statement)
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
        """The class with the most selection votes. At level 0 only this class could be certified."""
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


def shown_group(claim: Claim, plan: Plan) -> str | None:
    """Returns the name of the certified group; None if no group is certified, or coarse claims are hidden."""
    if claim.group is None or plan.hierarchy is None or not plan.coarse:
        return None
    return plan.hierarchy.names(claim.level)[claim.group]


def radii(claim: Claim, plan: Plan) -> tuple[float, float]:
    """Returns the radius of the certified class and that of the certified group; one of them, or both, are 0."""
    return (0.0 if claim.abstained else claim.radius), (0.0 if shown_group(claim, plan) is None else claim.radius)


def confidence_of(alpha: float) -> str:
    """Returns 1 - alpha in percent, with every digit, so that it is never rounded up."""
    percent = 100 - 100 * Decimal(repr(float(alpha)))
    return f"{percent:f}".rstrip("0").rstrip(".") + "%"


def statement(claim: Claim, plan: Plan, noise: str) -> str:
    """Returns what is certified, in one sentence. `noise` names the stream."""
    group = shown_group(claim, plan)
    if claim.abstained and group is None:
        return "Nothing is certified: the smoothed classifier abstains on this input."
    confidence = confidence_of(plan.alpha)
    if plan.mode == "predict":
        return f"With confidence {confidence}, this is the smoothed classifier's class; no radius is certified."
    caveat = f", {words}," if (words := caveat_of(noise)) else ""
    within = (
        f"With confidence {confidence}, no change of L2 norm below {claim.radius:.6f} to the model input "
        f"(pixel values in [0, 1]){caveat} changes "
    )
    if group is None:
        return f"{within}the {bound_named(plan.bound).adjective}smoothed classifier's class."
    groups = _groups_in_words(claim, plan)
    return f"{within}what the smoothed classifier over {groups} says: {group}. No class is certified."


def _groups_in_words(claim: Claim, plan: Plan) -> str:
    assert plan.hierarchy is not None
    names = plan.hierarchy.names(claim.level)
    if len(names) > 6:
        return f"the {len(names):,} groups of level {claim.level}"
    return f"the groups {', '.join(names[:-1])} and {names[-1]}"


def reason(claim: Claim, plan: Plan, classes: tuple[str, ...]) -> str | None:
    """Returns why the answer is an abstention, in words; None if it is not."""
    if not claim.abstained:
        return None
    if claim.group is not None:
        split = _split(claim, plan, classes)
        if (group := shown_group(claim, plan)) is None:
            return f"votes were split: {split}; a class was not to be expected, and coarse answers are hidden"
        return f"no class is certified, but a group of classes is, {group}: votes were split: {split}"
    if claim.stopped is not None and (too_few := too_few_votes(plan)):
        return too_few
    if claim.stopped in ("deadline", "cap"):
        why = "the deadline was reached" if claim.stopped == "deadline" else "the cap on votes was reached"
        fixed = "; the fixed plan proves nothing before its last vote" if plan.kind == "fixed" else ""
        return f"{why} after {claim.n:,} of {plan.n:,} votes{fixed}: allow more time or more votes"
    if claim.top_class is None or claim.stopped is None:
        return f"undecided: {claim.n:,} of {plan.n:,} votes are counted"
    split = _split(claim, plan, classes)
    if claim.stopped == "futility":
        return (
            f"a radius of {plan.radius:g} is out of reach, and {claim.n:,} votes ({split}) certify no smaller one: "
            "ask for less"
        )
    if plan.mode == "predict":
        return f"votes were split: {split}; the lead may be chance"
    holds = f"{math.floor(1000 * claim.p_lower) / 10:.1f} %"
    top, what = classes[claim.top_class] if claim.level == 0 else "", "class"
    if claim.level > 0 and plan.hierarchy is not None:
        top, what = f"the group {plan.hierarchy.names(claim.level)[claim.top_class]}", "group"
    return (
        f"votes were split: {split}; {top}, selected beforehand, is certain to hold only {holds} "
        f"of the noise{bound_named(plan.bound).shortfall(claim.p_upper, what)}"
    )


def _split(claim: Claim, plan: Plan, classes: tuple[str, ...]) -> str:
    """Returns the two classes with the most estimation votes, in words."""
    share = shares(from_record(claim.votes, soft=plan.soft))
    first, *second = sorted(range(len(classes)), key=lambda c: -share[c])[:2]
    return ", ".join(f"{classes[c]} {100 * share[c]:.1f} %" for c in (first, *second))
