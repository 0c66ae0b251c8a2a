"""Tests whether fresh votes contradict a record, for readers who cannot count the record's own votes again.

A record's votes were counted at a stopping time and are biased, so that a comparison with fresh votes would be invalid.
The record's claims about the probabilities can be tested: p_A >= p_lower, and p_c <= p_upper for every other class.
Against each of these hypotheses the fresh votes have an exact p-value, or a bound of it. A true claim is called
contradicted with probability at most `LEVEL`, whatever votes the claim was made from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import binom

from macer_serve.smoothing import mixture
from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Votes, count, levels_of

LEVEL = 0.001


@dataclass(frozen=True, slots=True)
class Evidence:
    """The test of one claim by fresh votes. `p_value` < `level` contradicts the claim; `words` describe the test."""

    words: str
    p_value: float
    level: float

    @property
    def contradicts(self) -> bool:
        return self.p_value < self.level


def evidence_against(plan: Plan, proof: Proof, top: int, votes: Votes, *, tau: float) -> list[Evidence]:
    """Returns the tests of a proof of class `top` by fresh votes; empty if nothing is claimed.

    The tests' levels sum to `LEVEL`. Hard votes: P(Bin(n, p_lower) <= k), exact. Soft votes: the betting martingale
    against the claimed mean, levels rounded in the claim's favour. PREDICT: of the copies that voted for A or c, at
    least half voted for A, exact given their number. `tau` is allowed for as in the proof.
    """
    others = [c for c in range(len(votes)) if c != top]
    if plan.mode == "predict":
        return _predict(proof, others, votes, tau)
    apart = bound_named(plan.bound).sides == 2 and proof.p_upper < 1.0 and bool(others)
    found = []
    if proof.p_lower > 0.0:
        level = LEVEL / 2 if apart else LEVEL
        p_value = _at_most(votes, top, max(0.0, proof.p_lower - tau))
        found.append(Evidence(f"{_share(votes, top)} for p_A >= {proof.p_lower:.6g}", p_value, level))
    if apart:
        # Any other class may be the runner-up. A forger chooses which class the record's votes favour.
        level = LEVEL / 2 / len(others)
        values = {c: _at_least(votes, c, min(1.0, proof.p_upper + tau)) for c in others}
        least = min(others, key=lambda c: values[c])
        words = f"{_share(votes, least)} for p_B <= {proof.p_upper:.6g} (class {least})"
        found.append(Evidence(words, values[least], level))
    return found


def _predict(proof: Proof, others: list[int], votes: Votes, tau: float) -> list[Evidence]:
    if proof.class_id is None or not others:
        return []
    k, n = int(votes[proof.class_id]), count(votes)
    rival = max(others, key=lambda c: int(votes[c]))  # the smallest p-value of all
    p_value = min(1.0, float(binom.cdf(k, k + int(votes[rival]), 0.5)) + n * tau)
    words = f"{k:,} votes against {int(votes[rival]):,} (class {rival}) of {n:,} for p_A >= p_B"
    return [Evidence(words, p_value, LEVEL / len(others))]


def _share(votes: Votes, c: int) -> str:
    n = count(votes)
    if votes.ndim == 1:
        return f"{int(votes[c]):,} of {n:,} votes"
    observed, levels = levels_of(votes, c, up=False)
    return f"a mean of {float(observed @ levels) / n:.6g} over {n:,} votes"


def _at_most(votes: Votes, c: int, p: float) -> float:
    """Returns the p-value of at most so many votes, or so low a mean, if the probability or mean is p or more."""
    if votes.ndim == 1:
        return float(binom.cdf(int(votes[c]), count(votes), p))
    return _soft(votes, c, 1.0 - p, up=True, mirrored=True)


def _at_least(votes: Votes, c: int, p: float) -> float:
    """Returns the p-value of at least so many votes, or so high a mean, if the probability or mean is p or less."""
    if votes.ndim == 1:
        return float(binom.sf(int(votes[c]) - 1, count(votes), p))
    return _soft(votes, c, p, up=False, mirrored=False)


def _soft(votes: Votes, c: int, m: float, *, up: bool, mirrored: bool) -> float:
    """Returns 1 / M against a mean of at most m, a p-value by Markov's inequality. `mirrored` takes 1 - levels."""
    counts, levels = levels_of(votes, c, up=up)
    if mirrored:
        counts, levels = mixture.mirrored(counts, levels)
    if m >= 1.0:
        return 1.0
    if m <= 0.0:
        return 0.0 if float(counts @ levels) > 0.0 else 1.0
    return math.exp(-max(0.0, mixture.log_evidence(counts, levels, math.log(m) - math.log1p(-m), count(votes)) - 1e-6))
