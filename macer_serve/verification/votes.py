"""Votes of one's own, to hold against a record's: the same ones counted again, or fresh ones."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from macer_serve.errors import ContradictedError
from macer_serve.smoothed import Question
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.certification import Draw, Purpose
from macer_serve.smoothing.contradiction import evidence_against
from macer_serve.smoothing.proof import Proof, Votes, count
from macer_serve.verification.findings import Finding, holds, unchecked
from macer_serve.verification.record import Basis
from macer_serve.voters import Task, Voter

Progress = Callable[[int, int], None]  # votes counted, of how many


def counted(voter: Voter, question: Question, seed: bytes, draws: list[Draw], progress: Progress) -> list[Votes]:
    """The votes of each draw, every worker of the voter busy."""
    window: deque[tuple[int, Draw, Future[list[Votes]]]] = deque()
    pieces = iter([(i, piece) for i, draw in enumerate(draws) for piece in draw.cut(voter.batch_sizes[-1])])
    sums: list[Votes | None] = [None] * len(draws)
    done, total = 0, sum(map(len, draws))
    while True:
        while len(window) < 2 * voter.workers and (piece := next(pieces, None)):
            window.append((*piece, voter.submit([Task(question.x, seed, piece[1])])))
        if not window:
            return [s for s in sums if s is not None]
        i, draw, future = window.popleft()
        (votes,) = future.result()
        before = sums[i]
        sums[i] = votes if before is None else before + votes
        done += len(draw)
        progress(done, total)


def recounted(basis: Basis, question: Question, voter: Voter, progress: Progress) -> Finding:
    """Whether the record's votes are those of the question's own seed: identical, or not."""
    recorded: dict[Purpose, Votes] = {"selection": basis.selection_votes, "estimation": basis.votes}
    draws = [Draw(purpose, 0, count(v), basis.plan.soft_beta) for purpose, v in recorded.items() if count(v)]
    found = counted(voter, question, question.seed, draws, progress)
    other = [d.purpose for d, votes in zip(draws, found, strict=True) if not np.array_equal(votes, recorded[d.purpose])]
    total = f"{sum(map(len, draws)):,} votes"
    if other:
        words = f"of {total} counted again with the secret, those of {' and '.join(other)} are others"
        return Finding("votes counted again", "does not hold", words)
    return holds("votes counted again", f"{total}, identical")


def met_by_fresh_votes(
    c: Certificate, basis: Basis, question: Question, voter: Voter, n: int, seed: bytes | None, progress: Progress
) -> Finding:
    """Whether `n` fresh votes under a random seed contradict the record."""
    proof = Proof(c.class_id, c.radius, c.p_lower, c.p_upper)
    if basis.top is None or (proof.p_lower <= 0.0 and proof.class_id is None):
        return unchecked("fresh votes", "the record claims nothing that they could contradict")
    draw = Draw("estimation", 0, n, basis.plan.soft_beta)
    (votes,) = counted(voter, question, secrets.token_bytes(16) if seed is None else seed, [draw], progress)
    found = evidence_against(basis.plan, proof, basis.top, votes, tau=c.tau)
    words = "; ".join(f"{e.words}: probability {e.p_value:.3g}, contradicted below {e.level:.3g}" for e in found)
    if voter.engine != c.engine:
        words += f"; by another engine, {voter.engine}, whose votes may differ at the margin"
    if any(e.contradicts for e in found):
        return Finding("fresh votes", "does not hold", words, ContradictedError)
    return holds("fresh votes", words)
