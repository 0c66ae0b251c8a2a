"""Running a certification, or a recount, on a voter of this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

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
    for_s: float = float("inf"),
    halted: Callable[[], bool] = lambda: False,
) -> None:
    """Run to the end on all workers of the voter, for input `x` under `seed`; drop passes that are left over.

    `progress` is called after every pass. `turn` and `small` are those of `Voter.submit`. After `for_s` seconds the run
    is left with every vote counted that it has asked for: no pass begins that would come later, but for the first ones.
    Once `halted` is true, it is left at the next pass, and what is in flight is dropped.
    """
    end = time.monotonic() + for_s
    pass_s = 0.0  # from submitting a pass to its votes

    def submit(draws: list[Draw]) -> tuple[Future[list[Votes]], float]:
        tasks = [Task(x, seed, draw) for draw in draws]
        return voter.submit(tasks, turn, small=small), time.monotonic()

    window: Window[tuple[Future[list[Votes]], float]] = Window(
        run, voter.batch_sizes[: 1 if small else None], voter.workers
    )
    try:
        window.fill(submit)
        while (oldest := window.oldest) is not None and not run.done and not halted():
            pending, submitted = oldest
            window.count(pending.result())
            if progress is not None:
                progress(run)
            pass_s = time.monotonic() - submitted
            if time.monotonic() + pass_s < end:
                window.fill(submit)  # nothing, if the run is done
    finally:
        for pending, _ in window.drain():
            pending.cancel()
