"""Checks of a record by itself: pure functions of its fields, without image or network.

A derived field is compared with the value that follows from the fields before it. Earlier fields are taken as recorded
if they hold, so that one changed field is named and not every field that follows from it. Bounds must agree to 1e-10 of
their distance from 0 and 1, because versions of SciPy differ in last digits. Rounding radii down allows for more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from macer_serve.errors import ParameterError
from macer_serve.fit import Fit, fit_for, upload_radius
from macer_serve.images import MAX_PIXELS
from macer_serve.smoothing import mixture
from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.certificate import Certificate, reason, statement
from macer_serve.smoothing.certification import Claim
from macer_serve.smoothing.noise import STREAMS, caveat_of, kind_of, noise_for
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.radius import round_down, two_sided_radius
from macer_serve.smoothing.votes import Votes, count, from_record, shares
from macer_serve.verification.findings import Finding, agrees, escaped, fails, holds, shown, unchecked

MAX_SIDE = 2048  # of model inputs whose fit is computed again: larger ones take minutes
MAX_WORK = 15 * 10**8  # stakes evaluated for the bounds of a soft record, some seconds
_SAME = 1e-10  # relative: bounds
_REASONS = {"fixed": (), "radius": ("radius", "futility"), "tolerance": ("tolerance",)}
_EDGE = 1e-10  # absolute: radii before they are rounded down, by which 1e-9 is taken off


@dataclass(frozen=True, slots=True)
class Basis:
    """What a record rests on: the plan, the votes, and the selected class, if a class was selected.

    `proof_votes` are the first of the estimation votes, from which bounds and radius follow.
    """

    plan: Plan
    votes: Votes
    proof_votes: Votes
    selection_votes: Votes
    top: int | None

    @property
    def looked(self) -> bool:
        """Whether the votes prove something. A fixed plan proves nothing before its last vote."""
        n = count(self.proof_votes)
        return self.top is not None and n > 0 and (self.plan.kind != "fixed" or n == self.plan.n)


def examine_record(
    c: Certificate, classes: tuple[str, ...] | None, no_classes: str, *, authentic: bool
) -> tuple[list[Finding], Basis | None]:
    """Returns the findings, and what votes can be compared with; None if the record cannot be read.

    `classes` are the labels of the model; if they are None, `no_classes` says why. Unless the record is `authentic`,
    only so much work is spent on its bounds as `MAX_WORK` allows.
    """
    try:
        plan = Plan.from_json(c.plan)
    except (ParameterError, ArithmeticError, ValueError) as error:
        return [
            fails("plan", escaped(str(error))),
            unchecked("all that follows", "the plan is unknown"),
        ], None
    found = [
        holds("plan", f"{plan.mode}, {plan.kind}, {plan.bound}: at most {plan.n:,} votes, alpha {plan.alpha:g}"),
        agrees("alpha, plan.alpha", float(c.alpha), float(plan.alpha), "the plan"),
        agrees("n0, plan.n0", c.n0, plan.selection, "the plan"),
        agrees("bound, plan.bound", c.bound, "+".join(plan.alpha_split), "the plan"),
        _known_noise(c),
        _sigma(c),
    ]
    basis, about_votes = _basis(c, plan)
    found += about_votes
    fit, about_fit = _fit(c)
    if basis is None:
        return [*found, unchecked("all that follows", "there are no votes that it could follow from"), *about_fit], None
    found.append(_stopped(c, basis))
    proof, about_proof = _proof(c, basis, authentic)
    found += about_proof
    if proof is not None:
        found += _words(c, basis, proof, classes, no_classes)
        found += about_fit
        if fit is not None:
            found += _through_fit(c, proof, fit)
    else:
        found += about_fit
    return found, basis


def _known_noise(c: Certificate) -> Finding:
    if kind_of(c.noise) is None:
        known = ", ".join(stream.name for stream in STREAMS.values())
        return fails("noise", f"{shown(c.noise)} is none of {known}")
    caveat = caveat_of(c.noise)
    return holds("noise", f"{c.noise}: certificates hold {caveat}" if caveat else c.noise)


def _sigma(c: Certificate) -> Finding:
    if not 0.005 <= c.sigma <= 4.0:
        return fails("sigma", f"{shown(c.sigma)} is outside [0.005, 4]")
    return holds("sigma", f"{c.sigma:g}")


def _basis(c: Certificate, plan: Plan) -> tuple[Basis | None, list[Finding]]:
    """Returns the votes, if they can be read, and the findings about them."""
    read: dict[str, Votes] = {}
    found = []
    proof_votes = c.votes if c.proof_votes is None else c.proof_votes
    records = (("votes", c.votes), ("proof_votes", proof_votes), ("selection_votes", c.selection_votes))
    for name, record in records:
        try:
            read[name] = from_record(record, soft=plan.soft)
        except ParameterError as error:
            found.append(fails(name, escaped(str(error))))
    if found:
        return None, found
    votes, proof, selection = read["votes"], read["proof_votes"], read["selection_votes"]
    drawn, selected = count(votes), count(selection)
    if drawn == c.n:
        found.append(holds("votes", f"{len(votes)} classes, {drawn:,} votes"))
    else:
        found.append(fails("votes", f"they add up to {drawn:,}, n is {shown(c.n)}"))
    early = c.stopped in (None, "deadline")
    for name, other in (("proof_votes", proof), ("selection_votes", selection)):
        if other.shape != votes.shape:
            words = f"{len(other)} classes, the estimation votes have {len(votes)}"
            return None, [*found, fails(name, words)]
    if count(proof) == c.proof_n and (proof <= votes).all() and (c.proof_votes is None) == (c.proof_n == c.n):
        found.append(holds("proof_n, proof_votes", f"the first {c.proof_n:,} of the votes"))
    else:
        words = (
            f"{count(proof):,} votes; they must be the first {shown(c.proof_n)} of the votes, or null for all of them"
        )
        found.append(fails("proof_n, proof_votes", words))
    if selected == plan.selection or (early and selected < plan.selection):
        found.append(holds("selection_votes", f"{selected:,} of {plan.selection:,}"))
    else:
        words = f"they add up to {selected:,}, the plan takes {plan.selection:,}"
        found.append(fails("selection_votes", words))
    top = None
    if plan.mode == "predict":
        top = int(votes.argmax()) if drawn else None
    elif not (early and selected < plan.selection):
        top = int(shares(selection).argmax())
    return Basis(plan, votes, proof, selection, top), found


def _stopped(c: Certificate, basis: Basis) -> Finding:
    """Returns whether the reason to stop fits the votes. No guarantee rests on when a run stopped."""
    plan, n = basis.plan, count(basis.votes)
    if c.stopped == "n":
        fits = n == plan.n
    elif c.stopped in (None, "cap", "deadline"):
        fits = n < plan.n or count(basis.selection_votes) < plan.selection
    elif c.stopped in ("radius", "tolerance", "futility"):
        fits = 0 < n < plan.n and c.stopped in _REASONS[plan.kind]
        fits = fits and (c.stopped != "radius" or c.radius >= float(plan.radius or 0.0))
    else:
        return fails("stopped", f"{shown(c.stopped)} is no reason to stop")
    why = "still running" if c.stopped is None else c.stopped
    if fits:
        return holds("stopped", f"{why}, after {n:,} of {plan.n:,} votes")
    words = f"{why}, after {n:,} of {plan.n:,} votes: the plan does not stop so"
    return fails("stopped", words)


def _proof(c: Certificate, basis: Basis, authentic: bool) -> tuple[Proof | None, list[Finding]]:
    """Returns the proof that the record should state, with its fields as recorded if they hold."""
    plan, source = basis.plan, "proof_votes, plan and tau"
    if not (0.005 <= c.sigma <= 4.0 and 0.0 <= c.tau <= 1.0):
        return None, [unchecked("p_lower, p_upper, radius", "sigma or tau are outside their range")]
    proof = Proof(None, 0.0, 0.0, 1.0)
    if basis.looked and plan.soft and not authentic:
        held = (basis.proof_votes > 0).sum(axis=1).tolist()
        if mixture.work(held, plan.n) > MAX_WORK:
            words = f"{sum(held):,} levels of votes under a plan of {plan.n:,} would take too long to evaluate"
            return None, [unchecked("p_lower, p_upper, radius", words)]
    if basis.looked:
        assert basis.top is not None
        try:
            proof = prove(plan, basis.proof_votes, basis.top, sigma=c.sigma, tau=c.tau)
        except (ParameterError, ArithmeticError, ValueError) as error:
            return None, [fails("p_lower", f"no bound can be computed: {error}")]
    p_lower = _as_recorded(c.p_lower, proof.p_lower)
    p_upper = _as_recorded(c.p_upper, proof.p_upper)
    found = [
        agrees("p_lower", float(c.p_lower), p_lower, source),
        agrees("p_upper", float(c.p_upper), p_upper, source),
    ]
    proof = replace(proof, p_lower=p_lower, p_upper=p_upper)
    if plan.mode == "certify":
        radius = two_sided_radius(proof.p_lower, proof.p_upper, c.sigma)
        # Two values are accepted only at the edge of the last digit shown.
        either = {round_down(max(0.0, radius - _EDGE)), round_down(radius + _EDGE), proof.radius}
        lawful = float(c.radius) if c.radius in either else round_down(radius)
        proof = replace(proof, radius=lawful)
    found.append(agrees("radius", float(c.radius), proof.radius, "p_lower, p_upper and sigma"))
    found.append(agrees("class_id", c.class_id, proof.class_id, "the votes"))
    found.append(agrees("abstained", c.abstained, proof.class_id is None, "the bounds"))
    return proof, found


def _as_recorded(recorded: float, derived: float) -> float:
    """Returns the recorded probability if it agrees with the derived one but for last digits, else the derived one."""
    same = 0.0 <= recorded <= 1.0 and abs(recorded - derived) <= _SAME * min(derived, 1.0 - derived)
    return float(recorded) if same else derived


def _words(
    c: Certificate, basis: Basis, proof: Proof, classes: tuple[str, ...] | None, no_classes: str
) -> list[Finding]:
    """Returns the findings about statement, reason and label."""
    claim = Claim(
        class_id=proof.class_id,
        radius=proof.radius,
        p_lower=proof.p_lower,
        p_upper=proof.p_upper,
        top_class=basis.top,
        votes=c.votes,
        n=count(basis.votes),
        proof_votes=c.votes if c.proof_votes is None else c.proof_votes,
        proof_n=c.proof_n,
        selection_votes=c.selection_votes,
        stopped=c.stopped,  # type: ignore[arg-type]  # examined on its own
    )
    said = statement(claim, basis.plan, c.noise)
    found = [agrees("statement", c.statement, said, "class, radius, alpha and noise")]
    if classes is None or len(classes) != len(basis.votes):
        return [*found, unchecked("label", no_classes), unchecked("reason", no_classes)]
    label = None if claim.class_id is None else classes[claim.class_id]
    found.append(agrees("label", c.label, label, "class_id and the checkpoint"))
    found.append(agrees("reason", c.reason, reason(claim, basis.plan, classes), "the votes"))
    return found


def _fit(c: Certificate) -> tuple[Fit | None, list[Finding]]:
    """Returns the map from upload to model input, built again from its sizes, and the findings about it."""
    try:
        size, crop = _sizes(c.fit["upload_size"], 2), _sizes(c.fit["crop"], 2)
        (resize, channels) = _sizes([c.fit["resize"], c.fit["channels"]], 2)
        if size[0] * size[1] > MAX_PIXELS or max(crop) > MAX_SIDE or resize > 16 * MAX_SIDE:
            return None, [unchecked("fit", f"sizes beyond {MAX_PIXELS:,} pixels, or {MAX_SIDE:,} of model input")]
        fit = fit_for((size[0], size[1]), resize, (crop[0], crop[1]), channels)
        norm = float(c.fit["norm"])
    except (ParameterError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        return None, [fails("fit", f"{shown(c.fit)} is no fit: {error}")]
    if abs(norm - fit.norm) <= 1e-12 * fit.norm:
        fit = replace(fit, norm=norm)
    if c.fit != fit.to_json():
        words = f"{shown(c.fit)} is recorded, {shown(fit.to_json())} follows from its sizes"
        return None, [fails("fit", words)]
    height, width = fit.upload_size
    return fit, [
        holds("fit", f"{height} x {width} to {fit.crop[0]} x {fit.crop[1]}, norm {norm:.6g}"),
        agrees("input.shape", c.input.get("shape"), [fit.channels, *fit.crop], "the fit"),
        agrees("input.upload_shape", c.input.get("upload_shape"), [height, width, 3], "the fit"),
    ]


def _sizes(value: Any, length: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != length or any(type(v) is not int or v < 1 for v in value):
        raise ParameterError(f"{shown(value)} are no sizes")
    return tuple(value)


def _through_fit(c: Certificate, proof: Proof, fit: Fit) -> list[Finding]:
    """Returns the findings about what depends on the fit: the radius at the upload, and tau."""
    dims = fit.channels * fit.crop[0] * fit.crop[1]
    derived = upload_radius(proof.radius, fit, dims)
    found = [agrees("upload_radius", float(c.upload_radius), float(derived), "radius and fit")]
    if (kind := kind_of(c.noise)) is None:
        return found
    noise = noise_for(kind, c.sigma)
    on_lattice, off = (noise.tau(np.full(dims, bit, np.int32)) for bit in (0, 1))
    known = off if fit.resampled and c.tau == off else on_lattice
    found.append(agrees("tau", float(c.tau), known, "noise, sigma and input shape"))
    return found
