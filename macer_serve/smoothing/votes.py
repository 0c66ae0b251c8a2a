"""Votes: which noisy copies are voted on, how votes are counted, and how records hold them.

Hard votes are int64 `[classes]`, the number of noisy copies that each class won. Soft votes are int64
`[classes, SOFT_LEVELS]`, a histogram per class of the softmax values that the copies gave it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from macer_serve.errors import ParameterError

Purpose = Literal["selection", "estimation"]
Votes = npt.NDArray[np.int64]
Record = tuple[int, ...] | tuple[tuple[tuple[int, int], ...], ...]

Counts = npt.NDArray[np.int64]
Levels = npt.NDArray[np.float64]

# Levels of a soft vote. Level l holds values in [l, l + 1) / SOFT_LEVELS; the last level also holds 1.
SOFT_LEVELS = 1024
# The two levels of a hard vote.
VOTE_LEVELS: Levels = np.array([0.0, 1.0])
# Soft records with more classes than this are refused. Their histograms would exceed 200 MB.
MAX_SOFT_CLASSES = 25_000


@dataclass(frozen=True, slots=True)
class Draw:
    """The noisy copies [start, stop) of a purpose's stream.

    `beta` None asks for hard votes. Otherwise soft votes at that inverse temperature are asked for.
    """

    purpose: Purpose
    start: int
    stop: int
    beta: float | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, size: int) -> list[Draw]:
        """Returns the same copies in consecutive draws of at most `size`."""
        return [replace(self, start=at, stop=min(at + size, self.stop)) for at in range(self.start, self.stop, size)]


def count(votes: Votes) -> int:
    """Returns the number of noisy copies that were voted on."""
    return int(votes.sum() if votes.ndim == 1 else votes[0].sum())


def shares(votes: Votes) -> npt.NDArray[np.float64]:
    """Returns each class's share of the votes, `[classes]`. Soft votes are rounded down to their level."""
    n = max(1, count(votes))
    if votes.ndim == 1:
        return votes / n
    weighted: npt.NDArray[np.float64] = votes @ (np.arange(SOFT_LEVELS) / SOFT_LEVELS) / n
    return weighted


def levels_of(votes: Votes, c: int, *, up: bool) -> tuple[Counts, Levels]:
    """Returns the observations of class c: the levels that occur and their counts.

    Soft votes are rounded down to their level, or up if `up` is true.
    """
    if votes.ndim == 1:
        k = int(votes[c])
        return np.array([int(votes.sum()) - k, k]), VOTE_LEVELS
    (held,) = votes[c].nonzero()
    return votes[c][held], (held + up) / SOFT_LEVELS


def recorded(votes: Votes) -> Record:
    """Returns the votes as a record holds them.

    Hard votes are one number per class. Soft votes are, per class, the levels that occur, each with its count.
    """
    if votes.ndim == 1:
        return tuple(votes.tolist())
    return tuple(tuple((int(level), int(row[level])) for level in row.nonzero()[0]) for row in votes)


def from_record(record: Any, *, soft: bool) -> Votes:
    """Returns the votes that `recorded` wrote; lists may stand for tuples.

    Raises `ParameterError` for anything else.
    """
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
            # Writing the votes again must give the same record: no negative, repeated or empty level.
            whole = all(type(x) is int for levels in record for pair in levels for x in pair)
            whole = whole and recorded(votes) == tuple(tuple(map(tuple, levels)) for levels in record)
            whole = whole and len(set(votes.sum(1).tolist())) == 1
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise ParameterError(f"not votes: {error}") from error
    # Sums of counts below 2^40 do not wrap.
    if not whole or not votes.size or votes.min() < 0 or votes.max() >= 2**40:
        raise ParameterError("not votes: whole numbers by class are needed, none of them negative")
    return votes
