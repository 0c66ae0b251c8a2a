"""The record's votes, counted again on the same noisy copies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from macer_serve.smoothed import ModelInput
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.selection import Selection, select
from macer_serve.smoothing.votes import Draw, Votes, count
from macer_serve.smoothing.window import Tally
from macer_serve.verification.engines import refused_batch, same_function
from macer_serve.verification.findings import Finding, fails, holds, shown, unchecked
from macer_serve.verification.record import Basis
from macer_serve.verification.verdicts import Verdict
from macer_serve.voters import Voter, drive

Progress = Callable[[int, int], None]  # votes counted, of how many
RECOUNT = "votes counted again"


def recounted(
    c: Certificate, basis: Basis, model_input: ModelInput, seed: bytes, voter: Voter, progress: Progress
) -> Finding:
    """Returns whether the record's votes are the votes on the noisy copies of `seed`.

    Another engine than the record's is another function. Its votes are compared with the record's, and what they prove
    is said beside what the record says.
    """
    beta = basis.plan.soft_beta
    first, all_of_them = count(basis.proof_votes), count(basis.votes)
    recorded: list[tuple[Draw, Votes]] = [
        (Draw("selection", 0, count(basis.selection_votes), beta), basis.selection_votes),
        (Draw("estimation", 0, first, beta), basis.proof_votes),
        (Draw("estimation", first, all_of_them, beta), basis.votes - basis.proof_votes),
    ]
    tally = Tally([draw for draw, _ in recorded])
    drive(tally, model_input.x, seed, voter, lambda t: progress(t.counted, t.total))
    again = [
        votes if len(draw) else np.zeros_like(basis.votes)
        for (draw, _), votes in zip(recorded, tally.votes, strict=True)
    ]
    other = [
        draw.purpose for (draw, votes), mine in zip(recorded, again, strict=True) if not np.array_equal(votes, mine)
    ]
    total = f"{tally.total:,} votes"
    if same_function(voter.engine, c.engine):
        if not other:
            return holds(RECOUNT, f"{total}, identical")
        words = f"of {total}, those of {' and '.join(dict.fromkeys(other))} are others"
        return fails(RECOUNT, words, Verdict.CONTRADICTED)
    words = f"the record's engine is {shown(c.engine)}, this one is {voter.engine}. "
    if refused := refused_batch(c.engine, model_input.x.shape[0] * model_input.x.shape[1]):
        words += f"Of the record's engine, {refused}. "
    words += _compared([votes for _, votes in recorded], again, tally.total) + _own_claim(c, basis, again)
    return unchecked(RECOUNT, words, Verdict.OTHER_ENGINE)


def _compared(recorded: list[Votes], again: list[Votes], total: int) -> str:
    if recorded[0].ndim > 1:
        return "Soft votes of another arithmetic differ in their levels. "
    moved = sum(int(np.abs(a - b).sum()) // 2 for a, b in zip(recorded, again, strict=True))
    return f"At least {moved:,} of {total:,} copies ({100 * moved / max(1, total):.2f} %) got another class. "


def _own_claim(c: Certificate, basis: Basis, again: list[Votes]) -> str:
    """Returns what the votes of this engine prove by themselves, on the same copies."""
    selection, first, rest = again
    votes = first if basis.looked else first + rest
    if not basis.looked or count(selection) != basis.plan.selection:
        return "The votes of this engine prove nothing at this number of votes."
    predicted = basis.plan.mode == "predict"
    chosen = Selection(0, int(votes.argmax())) if predicted else select(basis.plan, selection)
    proof = prove(basis.plan, votes, chosen.top, sigma=c.sigma, tau=c.tau, level=chosen.level)
    if proof.class_id is None:
        return "The votes of this engine certify nothing."
    what = f"class {proof.class_id}"
    if chosen.level and basis.plan.hierarchy is not None:
        what = f"the group {shown(basis.plan.hierarchy.names(chosen.level)[chosen.top])}"
    return f"The votes of this engine certify {what} with radius {proof.radius:.6f}."
