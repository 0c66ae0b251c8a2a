"""Which draws a driver has in flight: the same schedule for a thread pool, a cluster and a recount. Without I/O.

window = Window(run, batch_sizes=(64, 256), workers=2)
window.fill(submit)                          # submit(draws) starts a pass and returns its pending result
while (pending := window.oldest) is not None and not run.done:
    window.count(wait_for(pending))          # the votes of each draw of the oldest pass
    window.fill(submit)
drop(window.drain())                         # what is still in flight is of no use
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from macer_serve.smoothing.certification import Done, Waiting
from macer_serve.smoothing.votes import Draw, Votes

# A run takes small passes until it was handed as many copies as this many large passes hold. Most decisions are made
# by then.
EARLY_PASSES = 4

Pending = TypeVar("Pending")


class Source(Protocol):
    """What asks for draws and counts their votes: a `Certification`, or a `Tally` of fixed draws."""

    @property
    def handed_out(self) -> int: ...

    @property
    def done(self) -> bool: ...

    def wants(self, size: int | None = None) -> Draw | Waiting | Done: ...

    def add(self, draw: Draw, votes: npt.ArrayLike) -> None: ...


class Tally:
    """Fixed draws, which do not overlap, counted to their end. `votes` are the votes of each draw, in order."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        self.votes: list[Votes] = [np.zeros(0, dtype=np.int64)] * len(draws)
        self.total = sum(map(len, draws))
        self.counted = self.handed_out = 0
        self._draws, self._left = tuple(draws), deque(draw for draw in draws if len(draw))

    @property
    def done(self) -> bool:
        """Whether every vote is counted."""
        return self.counted == self.total

    def wants(self, size: int | None = None) -> Draw | Waiting | Done:
        """Returns the next copies to draw, at most `size` of them."""
        if not self._left:
            return Done() if self.done else Waiting()
        left = self._left.popleft()
        draw = left if size is None else replace(left, stop=min(left.start + size, left.stop))
        if draw.stop < left.stop:
            self._left.appendleft(replace(left, start=draw.stop))
        self.handed_out += len(draw)
        return draw

    def add(self, draw: Draw, votes: npt.ArrayLike) -> None:
        """Count the votes of a draw that was asked for."""
        counts = np.asarray(votes)
        (of,) = (i for i, d in enumerate(self._draws) if d.purpose == draw.purpose and d.start <= draw.start < d.stop)
        self.votes[of] = self.votes[of] + counts if self.votes[of].size else counts
        self.counted += len(draw)


class Window(Generic[Pending]):
    """The passes in flight of one run, oldest first, and what their votes are added to.

    `batch_sizes` are the voter's, ascending, in noisy copies per pass. `workers` is the number of passes that run at a
    time. A young run takes small passes and keeps few in flight, so that an early decision wastes little.
    """

    def __init__(self, run: Source, batch_sizes: tuple[int, ...], workers: int) -> None:
        self._run, self._batch_sizes, self._workers = run, batch_sizes, workers
        self._in_flight: deque[tuple[list[Draw], Pending]] = deque()

    def fill(self, submit: Callable[[list[Draw]], Pending]) -> None:
        """Submit passes until enough are in flight, or nothing more is to be drawn now."""
        while len(self._in_flight) < (self._workers + 1 if self._early else 2 * self._workers):
            if not (draws := self._next_pass()):
                return
            self._in_flight.append((draws, submit(draws)))

    @property
    def oldest(self) -> Pending | None:
        """The pending result that must be counted next; None if nothing is in flight."""
        return self._in_flight[0][1] if self._in_flight else None

    def count(self, votes: Sequence[Votes]) -> None:
        """Count the votes of the oldest pass, one array per draw."""
        draws, _ = self._in_flight.popleft()
        for draw, counts in zip(draws, votes, strict=True):
            self._run.add(draw, counts)

    def drain(self) -> Iterator[Pending]:
        """Yields what is still in flight, and forgets it."""
        while self._in_flight:
            yield self._in_flight.popleft()[1]

    @property
    def _early(self) -> bool:
        return self._run.handed_out < EARLY_PASSES * self._batch_sizes[-1]

    def _next_pass(self) -> list[Draw]:
        """Returns draws that together fill one pass; empty if nothing more is to be handed out now."""
        size = self._batch_sizes[0] if self._early else self._batch_sizes[-1]
        draws: list[Draw] = []
        while size and isinstance(want := self._run.wants(size), Draw):
            draws.append(want)
            size -= len(want)
        return draws
