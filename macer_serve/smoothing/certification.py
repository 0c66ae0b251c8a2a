"""Certification as a state machine without I/O. Any driver, offline, async or cluster, can feed it.

    run = Certification(plan, classes=10, sigma=0.25)
    while not isinstance(want := run.wants(), Done):
        ...                              # a Draw: obtain its votes, run.add(draw, votes); Waiting: collect votes
    claim = run.claim()

Draws are index ranges of the noise stream; a driver may cut them, have several in flight and return them in any order.
Only complete prefixes are evaluated, at the plan's looks only, so that the answer depends neither on how draws are cut
nor on the order in which votes arrive.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from macer_serve.errors import ParameterError
from macer_serve.smoothing.best_look import BestLook, Proved
from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import may_exceed, prove
from macer_serve.smoothing.selection import Selection, select
from macer_serve.smoothing.stopping import decided, least_to_stop
from macer_serve.smoothing.votes import SOFT_LEVELS, Draw, Purpose, Record, Votes, recorded

Stopped = Literal["n", "cap", "deadline", "radius", "tolerance", "futility"]


class Waiting:
    """Every draw is handed out; some votes are still missing."""


class Done:
    """The claim is final."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What has been proved. `radius` is rounded down, and 0 if nothing is proved.

    `class_id` is the certified class. If the selection votes chose a `level` of the hierarchy above the classes, it is
    None, and `group` is the certified group. `top_class` is the selected class, or group of the level; it is None while
    the selection votes are incomplete. `p_lower` bounds its probability, `p_upper` that of every other class or group.

    `votes` are the estimation votes per class up to the last look that was evaluated, `n` their number. A fixed plan
    has one look only; its `votes` are those counted so far.

    The bounds of all looks hold together, so that the largest radius of any look is proved. `proof_votes` are the
    `proof_n` votes up to the look with that radius. They are the `votes` themselves if no earlier look proves more.
    """

    class_id: int | None
    radius: float
    p_lower: float
    p_upper: float
    top_class: int | None
    votes: Record
    n: int
    proof_votes: Record
    proof_n: int
    selection_votes: Record
    stopped: Stopped | None
    level: int = 0
    group: int | None = None

    @property
    def abstained(self) -> bool:
        """Whether no class is certified. A group may be."""
        return self.class_id is None


@dataclass(slots=True)
class _Stream:
    """The votes of one purpose: a complete prefix, and ranges of votes that arrived before the ranges below them."""

    shape: tuple[int, ...]
    handed_out: int = 0
    prefix: int = 0
    votes: Votes = field(init=False)
    ahead: dict[int, tuple[int, Votes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.votes = np.zeros(self.shape, dtype=np.int64)

    def add(self, draw: Draw, votes: Votes) -> None:
        overlaps = draw.start < self.prefix or any(
            start < draw.stop and draw.start < stop for start, (stop, _) in self.ahead.items()
        )
        if overlaps or not draw.start < draw.stop <= self.handed_out:
            raise ValueError(f"{draw} was not asked for, or its votes are counted already")
        self.ahead[draw.start] = (draw.stop, votes)

    def advance(self) -> bool:
        """Count the next range that continues the prefix. Returns False if that range has not arrived."""
        if self.prefix not in self.ahead:
            return False
        self.prefix, arrived = self.ahead.pop(self.prefix)
        self.votes = self.votes + arrived
        return True


class Certification:
    """One certification of one input: asks for draws, takes votes, states what is proved.

    `tau` bounds the total variation between the sampled noise and the exact one (`Noise.tau`). `cap` ends the run
    after that many estimation votes; it adds no look. Raises `ParameterError` for a negative tau, or a cap below 1.
    """

    def __init__(self, plan: Plan, *, classes: int, sigma: float, tau: float = 0.0, cap: int | None = None) -> None:
        if not tau >= 0.0 or (cap is not None and cap < 1):
            raise ParameterError(f"tau must not be negative and a cap must be at least 1, not {tau} and {cap}")
        if plan.hierarchy is not None and plan.hierarchy.classes != classes:
            raise ParameterError(
                f"the plan's hierarchy groups {plan.hierarchy.classes} classes, the model has {classes}"
            )
        self.plan, self.classes, self.sigma, self.tau = plan, classes, sigma, tau
        self._limit = plan.n if cap is None else min(cap, plan.n)
        shape = (classes,) if plan.soft_beta is None else (classes, SOFT_LEVELS)
        self._selection, self._estimation = _Stream(shape), _Stream(shape)
        self._selected: Selection | None = None
        self._seen, self._at = np.zeros(shape, dtype=np.int64), 0
        self._looks = BestLook(self._proof, self._may_exceed)
        self._stopped: Stopped | None = None

    def wants(self, size: int | None = None) -> Draw | Waiting | Done:
        """Returns the next copies to draw, at most `size` of them, or `Waiting` for votes, or `Done`.

        Estimation copies are offered before the selection votes are back, because their votes are needed whichever
        class is selected. A draw ends at a look, because only whole draws are counted. Raises `ParameterError` for a
        size below 1.
        """
        if size is not None and size < 1:
            raise ParameterError(f"a draw has at least one copy, not {size}")
        if self.done:
            return Done()
        streams: tuple[tuple[Purpose, _Stream, int], ...] = (
            ("selection", self._selection, self.plan.selection),
            ("estimation", self._estimation, self._look_after(self._estimation.handed_out)),
        )
        for purpose, stream, limit in streams:
            if stream.handed_out < limit:
                stop = limit if size is None else min(limit, stream.handed_out + size)
                draw = Draw(purpose, stream.handed_out, stop, self.plan.soft_beta)
                stream.handed_out = stop
                return draw
        return Waiting()

    def add(self, draw: Draw, votes: npt.ArrayLike) -> None:
        """Count the votes of a draw, or of a part of a draw. Votes that arrive after the end change nothing.

        Raises `ValueError` for votes that do not add up to the draw, were not asked for, or are counted already. A vote
        that is counted twice would void the guarantee.
        """
        # A copy: votes that wait for their turn must not change with the caller's buffer.
        counts = np.array(votes)
        integers = counts.dtype.kind in "iu" and counts.shape == self._selection.shape
        # Summed as Python's integers, which do not wrap.
        rows = [counts] if counts.ndim == 1 else list(counts)
        if not integers or counts.min() < 0 or any(sum(row.tolist()) != len(draw) for row in rows):
            raise ValueError(f"{draw} needs {len(draw)} votes over {self.classes} classes, got {counts.tolist()}")
        streams = {"selection": self._selection, "estimation": self._estimation}
        if draw.purpose not in streams or draw.beta != self.plan.soft_beta:
            raise ValueError(f"{draw} is not a draw that this plan asks for")
        # A draw that crosses a look would bring votes to that look which depend on how draws were joined.
        if draw.purpose == "estimation" and draw.stop > (look := self._look_after(draw.start)):
            raise ValueError(f"{draw} was not asked for: it crosses the look at {look}")
        streams[draw.purpose].add(draw, counts.astype(np.int64))
        self._count()

    def stop(self, why: Literal["deadline"]) -> None:
        """End the run now, with what has been proved so far."""
        if self._stopped is None:
            self._stopped = why

    @property
    def handed_out(self) -> int:
        """Returns the number of copies that were asked for, selection and estimation together."""
        return self._selection.handed_out + self._estimation.handed_out

    def due(self, ahead: int = 0) -> int:
        """Returns how many more copies to ask for until the next look, or until the first look `ahead` copies on."""
        if self.done:
            return 0
        needed = (
            (self._selection, self.plan.selection),
            (self._estimation, self._look_after(max(self._at, self._at + ahead - 1))),
        )
        return sum(max(0, limit - stream.handed_out) for stream, limit in needed)

    @property
    def most(self) -> int:
        """Returns the number of copies that the run asks for at most."""
        return self.plan.selection + self._limit

    @property
    def seen(self) -> int:
        """Returns the number of estimation votes at the last look that was evaluated."""
        return self._at

    @property
    def drawn(self) -> int:
        """The number of votes that have arrived, selection and estimation together."""
        return sum(
            stream.prefix + sum(stop - start for start, (stop, _) in stream.ahead.items())
            for stream in (self._selection, self._estimation)
        )

    @property
    def done(self) -> bool:
        """Whether the claim is final."""
        return self._stopped is not None

    def claim(self) -> Claim:
        """Returns what is proved so far: with probability at least 1 - alpha, the class and the radius are right.

        Abstains while no look has been reached, and if the votes do not suffice. The claim depends on the plan and on
        the votes at the looks that were evaluated. It does not depend on how draws were cut or in which order they
        arrived.
        """
        fixed = self.plan.kind == "fixed"
        votes, n = (self._estimation.votes, self._estimation.prefix) if fixed else (self._seen, self._at)
        proved = self._looks.best or Proved(self._proof(self._seen), votes, n)
        proof = proved.proof
        level = 0 if self._selected is None else self._selected.level
        return Claim(
            class_id=proof.class_id if level == 0 else None,
            radius=proof.radius,
            p_lower=proof.p_lower,
            p_upper=proof.p_upper,
            top_class=None if self._selected is None else self._selected.top,
            votes=recorded(votes),
            n=n,
            proof_votes=recorded(proved.votes),
            proof_n=proved.n,
            selection_votes=recorded(self._selection.votes),
            stopped=self._stopped,
            level=level,
            group=None if level == 0 else proof.class_id,
        )

    def _proof(self, votes: Votes) -> Proof:
        """Returns what the votes of a look prove by themselves."""
        if self._selected is None or not self._at or (self.plan.kind == "fixed" and self._at < self.plan.n):
            return Proof(None, 0.0, 0.0, 1.0)
        level, top = self._selected.level, self._selected.top
        return prove(self.plan, votes, top, sigma=self.sigma, tau=self.tau, level=level)

    def _may_exceed(self, votes: Votes, radius: float) -> bool:
        assert self._selected is not None
        level, top = self._selected.level, self._selected.top
        return may_exceed(self.plan, votes, top, radius, sigma=self.sigma, tau=self.tau, level=level)

    def _look_after(self, votes: int) -> int:
        """Returns the next number of votes to evaluate: a look of the plan, or the cap."""
        looks = self.plan.looks
        return min(looks[min(bisect_right(looks, votes), len(looks) - 1)], self._limit)

    def _count(self) -> None:
        """Count votes that continue the prefixes, up to the first look that ends the run or needs the selection."""
        while self._selection.advance():
            pass
        selected = self._selection.prefix >= self.plan.selection
        if selected and self.plan.selection:
            self._selected = select(self.plan, self._selection.votes)
        while self._stopped is None:
            look = self._look_after(self._at)
            if self._estimation.prefix < look:
                if not self._estimation.advance():
                    return
            elif selected:
                self._look(look)
            else:
                return

    def _look(self, at: int) -> None:
        """Evaluate the votes at a look, and stop if the plan says so."""
        self._seen, self._at = self._estimation.votes, at
        if not self.plan.selection:
            self._selected = Selection(0, int(self._seen.argmax()))
        assert self._selected is not None  # the selection votes are complete, or the plan needs none
        if at in (self.plan.n, self._limit):
            self._looks.add(self._seen, at)
            self._stopped = "n" if at == self.plan.n else "cap"
            return
        level, top, limit = self._selected.level, self._selected.top, self._limit
        least = least_to_stop(self.plan, self._seen, top, sigma=self.sigma, limit=limit, level=level)
        proof = self._proof(self._seen) if self._may_exceed(self._seen, least) else None
        self._looks.add(self._seen, at, proof)
        radius = 0.0 if proof is None else proof.radius
        self._stopped = decided(self.plan, self._seen, top, radius, sigma=self.sigma, limit=limit, level=level)
