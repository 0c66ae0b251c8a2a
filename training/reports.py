"""How the workers of a run report to the driver, through an actor that the driver asks about once per second."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from macer_serve.errors import InterruptedRunError
from macer_serve.evaluation.logs import Row
from macer_serve.training.network import Group
from macer_serve.training.options import Callbacks

# Seconds that the workers have to finish a step and save, after a stop was requested. Then they are killed.
GRACE = 60.0
# Seconds without an answer of the actor after which, once a stop was requested, it counts as gone.
SILENCE = 5.0
# Seconds between two reports of the first worker, and between two questions of the driver.
INTERVAL = 1.0


def start_report_actor() -> Any:
    """Starts the actor on this machine: it keeps the reports of the first worker and the driver's request to stop."""
    import ray

    class ReportActor:  # pickled by value, since it is local: its process need not import this module, and torch
        def __init__(self) -> None:
            self.reports: list[tuple[str, Any]] = []
            self.stop = False

        def post(self, name: str, *arguments: Any) -> bool:
            self.reports.append((name, arguments))
            return self.stop

        def take(self, stop: bool) -> list[tuple[str, Any]]:
            reports, self.reports, self.stop = self.reports, [], stop
            return reports

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(ReportActor).remote()


class Reporter:
    """The worker's side. The first worker posts its progress about once per second and does not wait for answers."""

    def __init__(self, actor: Any, group: Group) -> None:
        self.actor, self.first = actor, group.rank == 0
        self.stop, self.answer, self.posted = False, None, 0.0

    @property
    def callbacks(self) -> Callbacks:
        return Callbacks(progress=self.progress, certified=self.certified, note=self.note)

    def progress(self, epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        import ray

        if not self.first:
            return
        if self.answer is not None and ray.wait([self.answer], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                self.stop = ray.get(self.answer)
            self.answer = None
        if step == steps or (self.answer is None and time.monotonic() - self.posted > INTERVAL):
            self.posted = time.monotonic()
            self.answer = self.actor.post.remote("progress", epoch, step, steps, metrics)

    def certified(self, row: Row) -> None:
        self.actor.post.remote("certified", row)

    def note(self, text: str) -> None:
        self.actor.post.remote("note", text)

    def interrupted(self, error: InterruptedRunError) -> None:
        """Reports that the state is saved.

        The driver then need not wait for the error from Ray Train, whose own processes a signal may have ended too.
        """
        if self.first:
            self.actor.post.remote("interrupted", str(error))  # text, so that the actor need not import torch


class Receiver:
    """The driver's side: passes reports on to the callbacks, and notices when no more will come."""

    def __init__(self, actor: Any, callbacks: Callbacks) -> None:
        self.actor, self.callbacks = actor, callbacks
        self.asked: Any = None  # a late answer is waited for again: the actor no longer has the reports in it
        self.received, self.answered = False, time.monotonic()
        self.stopping: float | None = None

    def receive(self, stop: bool) -> None:
        """Passes on what was reported, and tells the workers whether to stop.

        Raises the `InterruptedRunError` that a worker reported.
        """
        import ray

        if stop and self.stopping is None:
            self.stopping = time.monotonic()
        self.asked = self.asked or self.actor.take.remote(stop)
        if not ray.wait([self.asked], timeout=INTERVAL)[0]:
            return
        answer, self.asked = self.asked, None
        with contextlib.suppress(ray.exceptions.RayError):  # a run does not fail for a lost report
            for name, arguments in ray.get(answer):
                self.received = True
                if name == "interrupted":
                    raise InterruptedRunError(*arguments)
                getattr(self.callbacks, name)(*arguments)
            self.answered = time.monotonic()

    @property
    def timed_out(self) -> bool:
        """Whether a stop was requested, and the workers have not saved in time or the actor no longer answers."""
        if self.stopping is None:
            return False
        grace = GRACE if self.received or self.asked else 0.0  # nothing is lost before the first step
        return time.monotonic() > min(self.stopping + grace, self.answered + SILENCE)
