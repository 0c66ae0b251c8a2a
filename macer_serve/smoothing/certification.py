"""Certification as a state machine without I/O: any driver, offline, async or cluster, can feed it.

    run = Certification(plan, classes=10, sigma=0.25)
    while not isinstance(want := run.wants(), Done):
        ...                              # a Draw: obtain its votes, run.add(draw, votes); Waiting: collect votes
    claim = run.claim()

Draws are index ranges of the noise stream; a driver may cut them, have several in flight and return them in
any order. Only complete prefixes are evaluated, at the plan's looks only, so that the answer depends neither
on the cutting nor on who was first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from macer_serve.errors import ParameterError
from macer_serve.smoothing.bounds import clopper_pearson_lower, one_sided_radius, round_down
from macer_serve.smoothing.plan import Plan

Purpose = Literal["selection", "estimation"]
Votes = npt.NDArray[np.int64]
Stopped = Literal["n", "deadline", "cap"]


@dataclass(frozen=True, slots=True)
class Draw:
    """The noisy copies [start, stop) of a purpose's stream."""

    purpose: Purpose
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, size: int) -> list[Draw]:
        """The same copies in consecutive draws of at most `size`."""
        return [Draw(self.purpose, at, min(at + size, self.stop)) for at in range(self.start, self.stop, size)]


class Waiting:
    """Every draw is handed out; some votes are still missing."""


class Done:
    """The claim is final."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What has been proved. `radius` is rounded down already; `class_id` is None for an abstention.

    `top_class` is the selected class, None while the selection votes are incomplete. `votes` are the
    estimation votes that were evaluated, `n` their number.
    """

    class_id: int | None
    radius: float
    p_lower: float
    top_class: int | None
    votes: tuple[int, ...]
    n: int
    selection_votes: tuple[int, ...]
    bound: str
    stopped: str | None

    @property
    def abstained(self) -> bool:
        return self.class_id is None


@dataclass(slots=True)
class _Stream:
    """The votes of one purpose: a complete prefix, and ranges that arrived ahead of it."""

    classes: int
    handed_out: int = 0
    prefix: int = 0
    votes: Votes = field(init=False)
    ahead: dict[int, tuple[int, Votes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.votes = np.zeros(self.classes, dtype=np.int64)

    def add(self, draw: Draw, votes: Votes) -> None:
        overlaps = draw.start < self.prefix or any(
            start < draw.stop and draw.start < stop for start, (stop, _) in self.ahead.items()
        )
        if overlaps or not draw.start < draw.stop <= self.handed_out:
            raise ValueError(f"{draw} was not asked for, or its votes are counted already")
        self.ahead[draw.start] = (draw.stop, votes)
        while self.prefix in self.ahead:
            self.prefix, arrived = self.ahead.pop(self.prefix)
            self.votes = self.votes + arrived


class Certification:
    """One certification of one input: asks for draws, takes votes, states what is proved.

    `tau` bounds the total variation between the sampled noise and the exact one (`Noise.tau`); it is taken
    off the lower bound of p_A. `cap` ends the run after that many estimation votes; it adds no look. Raises
    `ParameterError` for a negative tau, or a cap below 1.
    """

    def __init__(self, plan: Plan, *, classes: int, sigma: float, tau: float = 0.0, cap: int | None = None) -> None:
        if not tau >= 0.0 or (cap is not None and cap < 1):
            raise ParameterError(f"tau must not be negative and a cap must be at least 1, not {tau} and {cap}")
        self.plan, self.classes, self.sigma, self.tau = plan, classes, sigma, tau
        self._limit = plan.n if cap is None else min(cap, plan.n)
        self._selection, self._estimation = _Stream(classes), _Stream(classes)
        self._streams: dict[str, _Stream] = {"selection": self._selection, "estimation": self._estimation}
        self._stopped: Stopped | None = None

    def wants(self, size: int | None = None) -> Draw | Waiting | Done:
        """The next copies to draw, at most `size` of them; `Waiting` for votes; or `Done`.

        Estimation copies are offered before the selection votes are back: their votes are needed whatever
        class is selected. Raises `ParameterError` for a size below 1.
        """
        if size is not None and size < 1:
            raise ParameterError(f"a draw has at least one copy, not {size}")
        if self._decided():
            return Done()
        streams: tuple[tuple[Purpose, _Stream, int], ...] = (
            ("selection", self._selection, self.plan.n0),
            ("estimation", self._estimation, min(self._next_look(), self._limit)),
        )
        for purpose, stream, limit in streams:
            if stream.handed_out < limit:
                stop = limit if size is None else min(limit, stream.handed_out + size)
                draw = Draw(purpose, stream.handed_out, stop)
                stream.handed_out = stop
                return draw
        return Waiting()

    def add(self, draw: Draw, votes: npt.ArrayLike) -> None:
        """Count the votes `int64 [classes]` of a draw, or of a part of one.

        Raises `ValueError` for votes that do not add up to the draw, were not asked for, or are counted
        already: a vote counted twice would void the guarantee.
        """
        # A copy: votes that wait for their turn must not change with the caller's buffer.
        counts = np.array(votes)
        integers = counts.dtype.kind in "iu" and counts.shape == (self.classes,)
        # Summed as Python's integers, which do not wrap.
        if not integers or counts.min() < 0 or sum(counts.tolist()) != len(draw):
            raise ValueError(f"{draw} needs {len(draw)} votes over {self.classes} classes, got {counts.tolist()}")
        if draw.purpose not in self._streams:
            raise ValueError(f"{draw} has a purpose that no plan asks for")
        self._streams[draw.purpose].add(draw, counts.astype(np.int64))

    def stop(self, why: Literal["deadline"]) -> None:
        """End the run now, with what has been proved so far."""
        if not self._decided():
            self._stopped = why

    @property
    def drawn(self) -> int:
        """The number of votes counted or waiting to be, selection and estimation together."""
        return sum(
            stream.prefix + sum(stop - start for start, (stop, _) in stream.ahead.items())
            for stream in (self._selection, self._estimation)
        )

    def claim(self) -> Claim:
        """What is proved so far: with probability at least 1 - alpha, the class and radius are right.

        Abstains while the plan's look has not been reached, and where the bound does not exceed 1/2.
        """
        selected = self._selection.prefix >= self.plan.n0
        top = int(self._selection.votes.argmax()) if selected else None
        votes = self._estimation.votes
        p_lower = 0.0
        if top is not None and self._estimation.prefix >= self.plan.n:
            p_lower = clopper_pearson_lower(int(votes[top]), self.plan.n, self.plan.alpha)
            if self.tau > 0.0:  # one step further down: a tau below p_lower's last digit must not be lost
                p_lower = max(0.0, math.nextafter(p_lower - self.tau, 0.0))
        certified = p_lower > 0.5
        return Claim(
            class_id=top if certified else None,
            radius=round_down(one_sided_radius(p_lower, self.sigma)),
            p_lower=p_lower,
            top_class=top,
            votes=tuple(votes.tolist()),
            n=self._estimation.prefix,
            selection_votes=tuple(self._selection.votes.tolist()),
            bound="clopper-pearson",
            stopped=self._ended(),
        )

    def _next_look(self) -> int:
        return next((look for look in self.plan.looks if look > self._estimation.prefix), self.plan.n)

    def _complete(self) -> bool:
        return self._selection.prefix >= self.plan.n0 and self._estimation.prefix >= self._limit

    def _ended(self) -> Stopped | None:
        if self._complete():
            return "n" if self._limit == self.plan.n else "cap"
        return self._stopped

    def _decided(self) -> bool:
        return self._stopped is not None or self._complete()
