"""Tasks for voters, and what drivers need of a voter."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from macer_serve.smoothing.noise import FixedPoint, Noise
from macer_serve.smoothing.votes import Draw, Votes


@dataclass(frozen=True, slots=True)
class Task:
    """The votes of the noisy copies `draw` of the input `x` (`int32 [H, W, C]`, fixed point) under `seed`."""

    x: FixedPoint
    seed: bytes
    draw: Draw


class Voter(Protocol):
    """What drivers need of an engine. A pass holds `batch_sizes` copies, `workers` passes run at a time."""

    engine: str
    batch_sizes: tuple[int, ...]
    workers: int
    classes: int
    noise: Noise

    def submit(self, tasks: Sequence[Task], turn: float = 0.0, *, small: bool = False) -> Future[list[Votes]]:
        """Returns the votes of each task, in order: int64 `[classes]`, or `[classes, SOFT_LEVELS]` for a soft draw.

        Passes that wait for a worker are made in the order of `turn`, lower ones first. With `small`, all are of the
        small batch size: other calls wait less for a worker.
        """
        ...
