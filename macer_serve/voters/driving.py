"""Running a certification, or a recount, on a voter of this process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from macer_serve.smoothing.noise import FixedPoint
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.smoothing.window import Source, Window
from macer_serve.voters.tasks import Task, Voter

S = TypeVar("S", bound=Source)


def drive(
    run: S,
    x: FixedPoint,
    seed: bytes,
    voter: Voter,
    progress: Callable[[S], None] | None = None,
    *,
    turn: float = 0.0,
    small: bool = False,
    for_s: float = math.inf,
    stop_s: float = math.inf,
    halt: Future[None] | None = None,
) -> None:
    """Run to the end on all workers of the voter, for input `x` under `seed`; drop passes that are left over.

    `progress` is called after every pass. `turn` and `small` are those of `Voter.submit`. After `for_s` seconds the run
    is left with every vote counted that it has asked for: no pass begins that would come later, but for the first ones.
    After `stop_s` seconds, or once `halt` is done, it is left as it is, and what is in flight is dropped.
    """
    began = time.monotonic()
    pass_s = 0.0  # from submitting a pass to its votes

    def submit(draws: list[Draw]) -> tuple[Future[list[Votes]], float]:
        tasks = [Task(x, seed, draw) for draw in draws]
        return voter.submit(tasks, turn, small=small), time.monotonic()

    sizes = voter.batch_sizes[: 1 if small else None]
    window: Window[tuple[Future[list[Votes]], float]] = Window(run, sizes, voter.workers)
    try:
        window.fill(submit)
        while (oldest := window.oldest) is not None and not run.done:
            pending, submitted = oldest
            awaited: list[Future[Any]] = [pending] if halt is None else [pending, halt]
            left_s = None if stop_s == math.inf else max(0.0, began + stop_s - time.monotonic())
            wait(awaited, left_s, FIRST_COMPLETED)
            if not pending.done() or (halt is not None and halt.done()):
                return
            window.count(pending.result())
            if progress is not None:
                progress(run)
            pass_s = time.monotonic() - submitted
            if time.monotonic() - began + pass_s < for_s:
                window.fill(submit)  # nothing, if the run is done
    finally:
        for pending, _ in window.drain():
            pending.cancel()
