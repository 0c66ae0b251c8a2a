"""Voters turn (input, seed, draw) into votes. Everything slow lives here, and no statistics.

A voter's votes depend on its base classifier and on the task, never on what else is computed beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from macer_serve.smoothing.certification import Draw
from macer_serve.smoothing.noise import FixedPoint, Noise
from macer_serve.smoothing.proof import Votes


@dataclass(frozen=True, slots=True)
class Task:
    """Votes wanted: of the noisy copies `draw` of the input `x` (`int32 [H, W, C]`, fixed point) under `seed`."""

    x: FixedPoint
    seed: bytes
    draw: Draw


class Voter(Protocol):
    """What drivers need of an engine: `step` copies fill one forward pass, `workers` of them run at a time."""

    engine: str
    step: int
    workers: int
    classes: int
    noise: Noise

    def submit(self, tasks: Sequence[Task]) -> Future[list[Votes]]:
        """The votes of each task, in order: int64 `[classes]`, or `[classes, SOFT_LEVELS]` where its draw is soft."""
        ...
