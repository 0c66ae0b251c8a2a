"""Votes that test a record: the record's own votes counted again, or fresh votes."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np

from macer_serve.errors import ContradictedError
from macer_serve.smoothed import Question
from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.contradiction import evidence_against
from macer_serve.smoothing.votes import Draw, Votes, count
from macer_serve.smoothing.window import Tally
from macer_serve.verification.findings import Finding, holds, unchecked
from macer_serve.verification.record import Basis
from macer_serve.voters import Voter, drive

Progress = Callable[[int, int], None]  # votes counted, of how many


def recounted(basis: Basis, question: Question, voter: Voter, progress: Progress) -> Finding:
    """Returns whether the record's votes are the votes of the input's own seed."""
    beta = basis.plan.soft_beta
    # The votes of the proof are the first of the estimation votes.
    recorded: list[tuple[Draw, Votes]] = [
        (Draw("selection", 0, count(basis.selection_votes), beta), basis.selection_votes),
        (Draw("estimation", 0, count(basis.proof_votes), beta), basis.proof_votes),
        (Draw("estimation", count(basis.proof_votes), count(basis.votes), beta), basis.votes - basis.proof_votes),
    ]
    recorded = [(draw, votes) for draw, votes in recorded if len(draw)]
    tally = Tally([draw for draw, _ in recorded])
    drive(tally, question.x, question.seed, voter, lambda t: progress(t.counted, t.total))
    other = [
        draw.purpose
        for (draw, votes), again in zip(recorded, tally.votes, strict=True)
        if not np.array_equal(votes, again)
    ]
    total = f"{tally.total:,} votes"
    if other:
        words = f"of {total} counted again with the secret, those of {' and '.join(dict.fromkeys(other))} are others"
        return Finding("votes counted again", "does not hold", words)
    return holds("votes counted again", f"{total}, identical")


def met_by_fresh_votes(
    c: Certificate, basis: Basis, question: Question, voter: Voter, n: int, seed: bytes | None, progress: Progress
) -> Finding:
    """Returns whether `n` fresh votes under `seed` (default: a random seed) contradict the record."""
    proof = Proof(c.class_id, c.radius, c.p_lower, c.p_upper)
    if basis.top is None or (proof.p_lower <= 0.0 and proof.class_id is None):
        return unchecked("fresh votes", "the record claims nothing that they could contradict")
    draw = Draw("estimation", 0, n, basis.plan.soft_beta)
    tally = Tally([draw])
    seed = secrets.token_bytes(16) if seed is None else seed
    drive(tally, question.x, seed, voter, lambda t: progress(t.counted, t.total))
    found = evidence_against(basis.plan, proof, basis.top, tally.votes[0], tau=c.tau)
    words = "; ".join(f"{e.words}: probability {e.p_value:.3g}, contradicted below {e.level:.3g}" for e in found)
    if voter.engine != c.engine:
        words += f"; by another engine, {voter.engine}, whose votes may differ at the margin"
    if any(e.contradicts for e in found):
        return Finding("fresh votes", "does not hold", words, ContradictedError)
    return holds("fresh votes", words)
