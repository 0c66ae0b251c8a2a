"""Checks of a record by itself: pure functions of its fields, without image or network.

A derived field is compared with the value that follows from the fields before it. Earlier fields are taken as recorded
if they hold, so that one changed field is named and not every field that follows from it. Bounds must agree to 1e-10 of
their distance from 0 and 1, because versions of SciPy differ in last digits. Rounding radii down allows for more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from macer_serve.errors import ParameterError
from macer_serve.smoothing import mixture
from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.certificate import Certificate, radii, reason, shown_group, statement
from macer_serve.smoothing.certification import Claim
from macer_serve.smoothing.noise import STREAMS, caveat_of, kind_of
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.radius import round_down, two_sided_radius
from macer_serve.smoothing.selection import Selection, select
from macer_serve.smoothing.votes import Votes, count, from_record
from macer_serve.verification.findings import Finding, agrees, escaped, fails, holds, shown, unchecked
from macer_serve.verification.fits import examine_fit, examine_through_fit

MAX_WORK = 15 * 10**8  # stakes evaluated for the bounds of a soft record, some seconds
_SAME = 1e-10  # relative: bounds
_REASONS = {"fixed": (), "radius": ("radius", "futility"), "tolerance": ("tolerance",)}
_EDGE = 1e-10  # absolute: radii before they are rounded down, by which 1e-9 is taken off


@dataclass(frozen=True, slots=True)
class Basis:
    """What a record rests on: the plan, the votes, and the selected class or group, if one was selected.

    `proof_votes` are the first of the estimation votes, from which bounds and radius follow.
    """

    plan: Plan
    votes: Votes
    proof_votes: Votes
    selection_votes: Votes
    selected: Selection | None

    @property
    def looked(self) -> bool:
        """Whether the votes prove something. A fixed plan proves nothing before its last vote."""
        n = count(self.proof_votes)
        return self.selected is not None and n > 0 and (self.plan.kind != "fixed" or n == self.plan.n)


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
    fit, about_fit = examine_fit(c)
    if basis is None:
        return [*found, unchecked("all that follows", "there are no votes that it could follow from"), *about_fit], None
    proof, about_proof = _proof(c, basis, authentic)
    found += [_stopped(c, basis, proof), *about_proof]
    if proof is not None:
        found += _words(c, basis, proof, classes, no_classes)
        found += about_fit
        if fit is not None:
            found += examine_through_fit(c, radii(_claim(c, basis, proof), plan), fit)
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
    if plan.hierarchy is not None and plan.hierarchy.classes != len(votes):
        return None, [*found, fails("plan.hierarchy", f"it groups {plan.hierarchy.classes} classes, not {len(votes)}")]
    chosen = None
    if plan.mode == "predict":
        chosen = Selection(0, int(votes.argmax())) if drawn else None
    elif not (early and selected < plan.selection):
        chosen = select(plan, selection)
    return Basis(plan, votes, proof, selection, chosen), found


def _stopped(c: Certificate, basis: Basis, proof: Proof | None) -> Finding:
    """Returns whether the reason to stop fits the votes. No guarantee rests on when a run stopped."""
    plan, n = basis.plan, count(basis.votes)
    if c.stopped == "n":
        fits = n == plan.n
    elif c.stopped in (None, "cap", "deadline"):
        fits = n < plan.n or count(basis.selection_votes) < plan.selection
    elif c.stopped in ("radius", "tolerance", "futility"):
        fits = 0 < n < plan.n and c.stopped in _REASONS[plan.kind]
        proved = c.radius if proof is None else proof.radius  # of the class, or of a group that may be hidden
        fits = fits and (c.stopped != "radius" or proved >= float(plan.radius or 0.0))
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
        assert basis.selected is not None
        level, top = basis.selected.level, basis.selected.top
        try:
            proof = prove(plan, basis.proof_votes, top, sigma=c.sigma, tau=c.tau, level=level)
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
        said = c.radius if c.group is None else c.group_radius
        lawful = float(said) if said in either else round_down(radius)
        proof = replace(proof, radius=lawful)
    claim = _claim(c, basis, proof)
    group, (radius, group_radius) = shown_group(claim, plan), radii(claim, plan)
    found.append(agrees("radius", float(c.radius), radius, "p_lower, p_upper and sigma"))
    found.append(agrees("class_id", c.class_id, claim.class_id, "the votes"))
    found.append(agrees("abstained", c.abstained, claim.abstained, "the bounds"))
    found.append(agrees("level", c.level, claim.level, "selection_votes and plan"))
    found.append(agrees("group", c.group, group, "the votes and plan"))
    found.append(agrees("group_radius", float(c.group_radius), group_radius, "p_lower, p_upper and sigma"))
    return proof, found


def _claim(c: Certificate, basis: Basis, proof: Proof) -> Claim:
    """Returns the claim that follows from the proof."""
    level = 0 if basis.selected is None else basis.selected.level
    return Claim(
        class_id=proof.class_id if level == 0 else None,
        radius=proof.radius,
        p_lower=proof.p_lower,
        p_upper=proof.p_upper,
        top_class=None if basis.selected is None else basis.selected.top,
        votes=c.votes,
        n=count(basis.votes),
        proof_votes=c.votes if c.proof_votes is None else c.proof_votes,
        proof_n=c.proof_n,
        selection_votes=c.selection_votes,
        stopped=c.stopped,  # type: ignore[arg-type]  # examined on its own
        level=level,
        group=None if level == 0 else proof.class_id,
    )


def _as_recorded(recorded: float, derived: float) -> float:
    """Returns the recorded probability if it agrees with the derived one but for last digits, else the derived one."""
    same = 0.0 <= recorded <= 1.0 and abs(recorded - derived) <= _SAME * min(derived, 1.0 - derived)
    return float(recorded) if same else derived


def _words(
    c: Certificate, basis: Basis, proof: Proof, classes: tuple[str, ...] | None, no_classes: str
) -> list[Finding]:
    """Returns the findings about statement, reason and label."""
    claim = _claim(c, basis, proof)
    said = statement(claim, basis.plan, c.noise)
    found = [agrees("statement", c.statement, said, "class, radius, alpha and noise")]
    if classes is None or len(classes) != len(basis.votes):
        return [*found, unchecked("label", no_classes), unchecked("reason", no_classes)]
    label = None if claim.class_id is None else classes[claim.class_id]
    found.append(agrees("label", c.label, label, "class_id and the checkpoint"))
    found.append(agrees("reason", c.reason, reason(claim, basis.plan, classes), "the votes"))
    return found
