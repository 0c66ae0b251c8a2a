"""How workers and the process that started them talk: over a desk, where one leaves notes and the other looks in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from macer_serve.evaluation.logs import Row
from macer_serve.training.loop import InterruptedRunError
from macer_serve.training.network import Group

# Whom to pass on what is said, by the name under which it is said.
Hear = Mapping[str, Callable[..., None]]
# Seconds that workers have, once the run is to stop, to finish a step and save; then they are ended as they are.
GRACE = 60.0
# Seconds without an answer after which, once the run is to stop, nobody is thought to be there any more.
SILENCE = 5.0
# Seconds between two reports of the first worker, and between two looks of the driver.
REPORTS = 1.0


def new_desk() -> Any:
    """An actor on this machine where the first worker leaves what it has to say, and learns whether to stop."""
    import ray

    class Desk:  # a class within a function is sent to the actor whole: it need not import this module, and torch
        def __init__(self) -> None:
            self.said: list[tuple[str, Any]] = []
            self.stop = False

        def tell(self, name: str, *what: Any) -> bool:
            self.said.append((name, what))
            return self.stop

        def take(self, stop: bool) -> list[tuple[str, Any]]:
            said, self.said, self.stop = self.said, [], stop
            return said

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(Desk).remote()


class Reports:
    """What the first worker leaves at the desk, about once a second and without waiting for an answer."""

    def __init__(self, desk: Any, group: Group) -> None:
        self.desk, self.first = desk, group.rank == 0
        self.stop, self.answer, self.told = False, None, 0.0

    def progress(self, epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        import ray

        if not self.first:
            return
        if self.answer is not None and ray.wait([self.answer], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                self.stop = ray.get(self.answer)
            self.answer = None
        if step == steps or (self.answer is None and time.monotonic() - self.told > REPORTS):
            self.told = time.monotonic()
            self.answer = self.desk.tell.remote("progress", epoch, step, steps, metrics)

    def certified(self, row: Row) -> None:
        self.desk.tell.remote("certified", row)

    def note(self, text: str) -> None:
        self.desk.tell.remote("note", text)

    def interrupted(self, error: InterruptedRunError) -> None:
        # All is saved then, and the driver need not wait until Ray Train, whose own processes a signal may have ended
        # too, brings it the error.
        if self.first:
            self.desk.tell.remote("interrupted", error)


class Listening:
    """The starter's side: passes on what was left at the desk, and knows when nobody will leave anything more."""

    def __init__(self, desk: Any, hear: Hear) -> None:
        self.desk, self.hear = desk, hear
        self.asked: Any = None  # an answer that is late is waited for again: it holds what the desk no longer has
        self.heard, self.answered = False, time.monotonic()
        self.stopping: float | None = None

    def once(self, stop: bool) -> None:
        """Look in, and say whether the run is to stop. Raises the `InterruptedRunError` that workers report."""
        import ray

        if stop and self.stopping is None:
            self.stopping = time.monotonic()
        self.asked = self.asked or self.desk.take.remote(stop)
        if not ray.wait([self.asked], timeout=REPORTS)[0]:
            return
        answer, self.asked = self.asked, None
        with contextlib.suppress(ray.exceptions.RayError):  # reports are a courtesy
            for name, said in ray.get(answer):
                self.heard = True
                if name == "interrupted":
                    raise said[0]
                self.hear[name](*said)
            self.answered = time.monotonic()

    @property
    def in_vain(self) -> bool:
        """Whether the run was to stop, and those who should have do not answer, or take too long."""
        if self.stopping is None:
            return False
        grace = GRACE if self.heard or self.asked else 0.0  # nothing is lost before the first step
        return time.monotonic() > min(self.stopping + grace, self.answered + SILENCE)
