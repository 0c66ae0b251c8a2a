"""The look of a run whose votes prove the largest radius. All looks hold at once, so that one may be chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from macer_serve.smoothing.bounds.base import Proof
from macer_serve.smoothing.votes import Votes

_KEPT = 100_000  # numbers in votes of looks that wait for their evaluation


@dataclass(frozen=True, slots=True)
class Proved:
    """A proof and the `n` estimation votes that it follows from."""

    proof: Proof
    votes: Votes
    n: int


class BestLook:
    """Finds the look with the largest radius, the first of equals. Looks are evaluated when it is asked for.

    `prove` says what votes prove by themselves; `may_exceed` is False only if that is no more than a radius, and is
    cheaper. The radii of most runs grow from look to look. So the last look is evaluated first, and then hardly
    another one needs to be.
    """

    def __init__(self, prove: Callable[[Votes], Proof], may_exceed: Callable[[Votes, float], bool]) -> None:
        self._prove, self._may_exceed = prove, may_exceed
        self._best: Proved | None = None
        self._waiting: list[tuple[Votes, int]] = []

    def add(self, votes: Votes, n: int, proof: Proof | None = None) -> None:
        """Takes the next look, at `n` votes, and what it proves, if that is known already."""
        if proof is not None:
            self._evaluate(self._waiting, Proved(proof, votes, n))
            return
        self._waiting.append((votes, n))
        if len(self._waiting) * votes.size > _KEPT:  # histograms of soft votes are large
            self._evaluate_waiting()

    @property
    def best(self) -> Proved | None:
        """The look with the largest radius so far; None if no look proves a class."""
        self._evaluate_waiting()
        return self._best

    def _evaluate_waiting(self) -> None:
        if self._waiting:
            *earlier, (votes, n) = self._waiting
            exceeds = self._may_exceed(votes, self._radius)
            self._evaluate(earlier, Proved(self._prove(votes), votes, n) if exceeds else None)

    def _evaluate(self, earlier: list[tuple[Votes, int]], last: Proved | None) -> None:
        """Takes the looks in their order. Those before the last are evaluated only if they may prove as much."""
        self._waiting = []
        as_much = 0.0 if last is None else math.nextafter(last.proof.radius, 0.0)
        for votes, n in earlier:
            if self._may_exceed(votes, max(self._radius, as_much)):
                self._take(Proved(self._prove(votes), votes, n))
        if last is not None:
            self._take(last)

    def _take(self, proved: Proved) -> None:
        if proved.proof.class_id is not None and (self._best is None or proved.proof.radius > self._radius):
            self._best = proved

    @property
    def _radius(self) -> float:
        return 0.0 if self._best is None else self._best.proof.radius
