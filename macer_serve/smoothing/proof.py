"""What votes prove under a plan, and whether more of them are worth drawing. Pure functions of the votes.

`votes` are estimation votes, int64 `[classes]`, or `[classes, SOFT_LEVELS]` histograms for soft ones; `top` is the
class that the selection votes chose. Whoever holds a certificate can evaluate the same functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from macer_serve.errors import ParameterError
from macer_serve.smoothing import mixture
from macer_serve.smoothing.bounds import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    one_sided_radius,
    round_down,
    top_two_p_value,
    two_sided_radius,
)
from macer_serve.smoothing.plan import FUTILITY, Plan

Votes = npt.NDArray[np.int64]
Record = tuple[int, ...] | tuple[tuple[tuple[int, int], ...], ...]
Decision = Literal["radius", "tolerance", "futility"]

# Soft votes are histograms over so many levels: level l holds z in [l, l + 1) / SOFT_LEVELS, and 1 in the last.
SOFT_LEVELS = 1024
# Records from outside are read no further: 200 MB.
MAX_SOFT_CLASSES = 25_000


@dataclass(frozen=True, slots=True)
class Proof:
    """`class_id` None: nothing is certified. `radius` is rounded down; `p_lower` bounds p_A, `p_upper` every other."""

    class_id: int | None
    radius: float
    p_lower: float
    p_upper: float


def count(votes: Votes) -> int:
    """The number of noisy copies that were voted on."""
    return int(votes.sum() if votes.ndim == 1 else votes[0].sum())


def shares(votes: Votes) -> npt.NDArray[np.float64]:
    """The share of the votes that each class has, `[classes]`; soft votes rounded down to their level."""
    n = max(1, count(votes))
    if votes.ndim == 1:
        return votes / n
    weighted: npt.NDArray[np.float64] = votes @ (np.arange(SOFT_LEVELS) / SOFT_LEVELS) / n
    return weighted


def recorded(votes: Votes) -> Record:
    """The votes as a record holds them: by class a number, or the levels that occur, each with its count."""
    if votes.ndim == 1:
        return tuple(votes.tolist())
    return tuple(tuple((int(level), int(row[level])) for level in row.nonzero()[0]) for row in votes)


def from_record(record: Any, *, soft: bool) -> Votes:
    """The votes that `recorded` wrote, lists in place of tuples. Raises `ParameterError` for anything else."""
    try:
        if not soft:
            votes = np.array([int(k) for k in record], dtype=np.int64)
            whole = all(type(k) is int for k in record)
        else:
            if len(record) > MAX_SOFT_CLASSES:
                raise ValueError(f"{len(record):,} classes of histograms")
            votes = np.zeros((len(record), SOFT_LEVELS), dtype=np.int64)
            for row, levels in zip(votes, record, strict=True):
                for level, k in levels:
                    row[level] = k
            # Written again it is the same: no level below 0, none twice, none empty.
            whole = all(type(x) is int for levels in record for pair in levels for x in pair)
            whole = whole and recorded(votes) == tuple(tuple(map(tuple, levels)) for levels in record)
            whole = whole and len(set(votes.sum(1).tolist())) == 1
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise ParameterError(f"not votes: {error}") from error
    # Below 2^40, no sum of them wraps.
    if not whole or not votes.size or votes.min() < 0 or votes.max() >= 2**40:
        raise ParameterError("not votes: whole numbers by class are needed, none of them negative")
    return votes


def prove(plan: Plan, votes: Votes, top: int, *, sigma: float, tau: float) -> Proof:
    """What the votes prove: false with probability at most alpha, whenever the run was stopped at one of its looks.

    `tau` bounds how far the sampled noise is from the exact one, in total variation an image.
    """
    if plan.mode == "predict":
        return _predict(plan, votes, tau)
    p_lower = _p_lower(plan, votes, top)
    if tau > 0.0:  # one step further: a tau below the last digit must not be lost
        p_lower = max(0.0, math.nextafter(p_lower - tau, 0.0))
    p_upper, radius = 1.0 - p_lower, one_sided_radius(p_lower, sigma)
    if plan.bound != "one-sided":
        others = _p_upper(plan, votes, top)
        if tau > 0.0:
            others = min(1.0, math.nextafter(others + tau, 2.0))
        apart = two_sided_radius(p_lower, others, sigma)
        # Votes add up to one, so that p_A bounds the others, too; soft votes do so only up to rounding.
        if plan.bound == "soft":
            p_upper, radius = others, apart
        else:
            p_upper, radius = min(p_upper, others), max(radius, apart)
    return Proof(top if p_lower > p_upper else None, round_down(radius), p_lower, p_upper)


def decided(plan: Plan, votes: Votes, top: int, *, sigma: float, tau: float, limit: int) -> Decision | None:
    """Why the run should stop at this look; None while more votes, `limit` at most, are worth drawing.

    It rests on estimates where that saves votes: whatever it says, what `prove` says remains true.
    """
    if plan.radius is not None:
        return _radius_decided(plan, plan.radius, votes, top, sigma, tau)
    if plan.tolerance is not None:
        radius = prove(plan, votes, top, sigma=sigma, tau=tau).radius
        return "tolerance" if _attainable(plan, votes, top, sigma, limit) - radius <= plan.tolerance else None
    return None


def _predict(plan: Plan, votes: Votes, tau: float) -> Proof:
    """Cohen et al. 2019, PREDICT: the class alone, radius 0. tau an image adds up over the images."""
    n = count(votes)
    second, first = np.sort(votes)[-2:].tolist() if len(votes) > 1 else (0, n)
    holds = n >= plan.n and top_two_p_value(first, second) + n * tau <= plan.alpha
    return Proof(int(votes.argmax()) if holds else None, 0.0, 0.0, 1.0)


def _sides(plan: Plan) -> int:
    """Among how many bounds alpha is shared: p_A's, and the true runner-up's, which is fixed though unknown."""
    return 1 if plan.bound == "one-sided" else 2


def levels_of(votes: Votes, c: int, *, up: bool) -> tuple[mixture.Counts, mixture.Levels]:
    """The observations of class c: how often which level, soft ones rounded down, or `up`."""
    if votes.ndim == 1:
        k = int(votes[c])
        return np.array([int(votes.sum()) - k, k]), mixture.VOTE_LEVELS
    (held,) = votes[c].nonzero()
    return votes[c][held], (held + up) / SOFT_LEVELS


def _p_lower(plan: Plan, votes: Votes, top: int) -> float:
    best, n = 0.0, count(votes)
    for bound, spend in plan.alpha_split.items():
        each = spend / _sides(plan)
        if bound == "mixture":
            log_odds = mixture.lower(*levels_of(votes, top, up=False), each, plan.n)
            best = max(best, mixture.probability_below(log_odds))
        elif n == plan.n:
            best = max(best, clopper_pearson_lower(int(votes[top]), n, each))
    return best


def _p_upper(plan: Plan, votes: Votes, top: int) -> float:
    """The bound of the most probable of the other classes."""
    others = [c for c in np.argsort(-shares(votes)).tolist() if c != top]
    if not others:
        return 0.0
    least, n = 1.0, count(votes)
    for bound, spend in plan.alpha_split.items():
        each = spend / _sides(plan)
        if bound == "mixture":
            least = min(least, mixture.probability_above(_highest(votes, others, each, plan.n)))
        elif n == plan.n:  # rises with k: the runner-up's is the highest
            least = min(least, clopper_pearson_upper(int(votes[others[0]]), n, each))
    return least


def _highest(votes: Votes, others: list[int], alpha: float, horizon: int) -> float:
    """The highest mixture bound among classes, by falling share: one root, and one evaluation for most others."""
    highest = -math.inf
    for c in others[:1] if votes.ndim == 1 else others:  # hard votes: it rises with k
        if highest == math.inf:  # one class bounded by nothing: no other can be higher
            break
        counts, levels = levels_of(votes, c, up=True)
        if mixture.log_evidence(*mixture.mirrored(counts, levels), -highest, horizon) < mixture.threshold(alpha):
            highest = mixture.upper(counts, levels, alpha, horizon)
    return highest


def _radius_decided(plan: Plan, radius: float, votes: Votes, top: int, sigma: float, tau: float) -> Decision | None:
    if plan.bound == "one-sided":  # one evaluation of the martingale says what its root would
        counts, levels = levels_of(votes, top, up=False)
        target = float(ndtr((radius + 2e-6) / sigma)) + tau  # 2e-6: what is shown is rounded down
        if target < 1.0:
            log_odds = math.log(target) - math.log1p(-target)
            spend = plan.alpha_split["mixture"]
            if mixture.log_evidence(counts, levels, log_odds, plan.n) >= mixture.threshold(spend):
                return "radius"
            if mixture.log_evidence(*mixture.mirrored(counts, levels), -log_odds, plan.n) < mixture.threshold(FUTILITY):
                return None
        return "futility"
    if prove(plan, votes, top, sigma=sigma, tau=tau).radius >= radius:
        return "radius"
    return None if _conceivable(plan, votes, top, sigma) >= radius else "futility"


def _limits(plan: Plan, votes: Votes, top: int) -> tuple[float, float]:
    """How large p_A, and how small the runner-up's probability, can be held to be at the level of futility."""
    most = mixture.probability_above(mixture.upper(*levels_of(votes, top, up=True), FUTILITY, plan.n))
    if plan.bound == "one-sided":
        return most, 1.0 - most
    share = shares(votes)
    share[top] = -1.0
    runner_up = int(share.argmax())
    log_odds = mixture.lower(*levels_of(votes, runner_up, up=False), FUTILITY, plan.n)
    return most, mixture.probability_below(log_odds)


def _conceivable(plan: Plan, votes: Votes, top: int, sigma: float) -> float:
    """The largest true radius that the votes do not speak against."""
    most, least = _limits(plan, votes, top)
    return two_sided_radius(most, max(least, 1e-12), sigma)


def _attainable(plan: Plan, votes: Votes, top: int, sigma: float, limit: int) -> float:
    """The radius that `limit` votes would prove if p_A were as large as can be held."""
    most, least = _limits(plan, votes, top)
    n = count(votes)
    if votes.ndim == 1:
        k = min(limit, math.ceil(most * limit))
        rest = limit - k
        # The others share what is left, none of them above the runner-up; somebody must have it.
        runner_up = rest
        if plan.bound != "one-sided":
            runner_up = min(rest, max(math.floor(least * limit), -(-rest // max(1, len(votes) - 1))))
        hoped = np.array([k, *[runner_up] * (rest // max(1, runner_up)), rest % max(1, runner_up)])
        return prove(plan, hoped, 0, sigma=sigma, tau=0.0).radius
    # Soft votes as they are, but more of them: their bounds lie as far from the limits as from their means.
    more = np.rint(votes * (limit / n)).astype(np.int64)
    mean, proof = shares(votes), prove(plan, more, top, sigma=sigma, tau=0.0)
    second = np.delete(mean, top).max(initial=0.0)
    p_lower = min(proof.p_lower + most - mean[top], 1.0 - 1e-12)
    return two_sided_radius(p_lower, max(proof.p_upper + least - second, 1e-12), sigma)
