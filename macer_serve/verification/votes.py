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
from macer_serve.smoothing.votes import Draw, Purpose, Votes, count
from macer_serve.smoothing.window import Tally
from macer_serve.verification.findings import Finding, holds, unchecked
from macer_serve.verification.record import Basis
from macer_serve.voters import Voter, drive

Progress = Callable[[int, int], None]  # votes counted, of how many


def recounted(basis: Basis, question: Question, voter: Voter, progress: Progress) -> Finding:
    """Returns whether the record's votes are the votes of the input's own seed."""
    recorded: dict[Purpose, Votes] = {"selection": basis.selection_votes, "estimation": basis.votes}
    draws = [Draw(purpose, 0, count(v), basis.plan.soft_beta) for purpose, v in recorded.items() if count(v)]
    tally = Tally(draws)
    drive(tally, question.x, question.seed, voter, lambda t: progress(t.counted, t.total))
    other = [purpose for purpose, votes in tally.votes.items() if not np.array_equal(votes, recorded[purpose])]
    total = f"{tally.total:,} votes"
    if other:
        words = f"of {total} counted again with the secret, those of {' and '.join(other)} are others"
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
    found = evidence_against(basis.plan, proof, basis.top, tally.votes["estimation"], tau=c.tau)
    words = "; ".join(f"{e.words}: probability {e.p_value:.3g}, contradicted below {e.level:.3g}" for e in found)
    if voter.engine != c.engine:
        words += f"; by another engine, {voter.engine}, whose votes may differ at the margin"
    if any(e.contradicts for e in found):
        return Finding("fresh votes", "does not hold", words, ContradictedError)
    return holds("fresh votes", words)
