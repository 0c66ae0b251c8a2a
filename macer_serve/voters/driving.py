"""Running a certification, or a recount, on a voter of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from macer_serve.smoothing.noise import FixedPoint
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.smoothing.window import Source, Window
from macer_serve.voters.tasks import Task, Voter

S = TypeVar("S", bound=Source)


def drive(run: S, x: FixedPoint, seed: bytes, voter: Voter, progress: Callable[[S], None] | None = None) -> None:
    """Run to the end on all workers of the voter, for input `x` under `seed`; drop passes that are left over.

    `progress` is called after every pass.
    """

    def submit(draws: list[Draw]) -> Future[list[Votes]]:
        return voter.submit([Task(x, seed, draw) for draw in draws])

    window: Window[Future[list[Votes]]] = Window(run, voter.batch_sizes, voter.workers)
    window.fill(submit)
    while (pending := window.oldest) is not None and not run.done:
        window.count(pending.result())
        if progress is not None:
            progress(run)
        window.fill(submit)  # nothing, if the run is done
    for left in window.drain():
        left.cancel()
