"""Calls to a voter, each of one pass or more, and whose pass is made next. Thread-safe; without an engine.

calls = Calls()
call = Call(tasks, classes, batches, turn)
calls.add(call)                       # once; next_pass() is then called once for each batch
call, batch = calls.next_pass()
call.count(batch, logits)             # or call.fail(error); call.votes is the future of all votes
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from macer_serve.smoothing.votes import SOFT_LEVELS, Votes
from macer_serve.voters.packing import Batch
from macer_serve.voters.tasks import Task

# One pass in so many is of the call that has waited longest, whatever its turn: it does not wait for ever.
_PATIENCE = 8


class Call:
    """The votes of some tasks, counted pass by pass. Calls go in the order of `turn`, lower ones first."""

    def __init__(self, tasks: tuple[Task, ...], classes: int, batches: Iterable[Batch], turn: float) -> None:
        self.tasks, self.turn = tasks, turn
        self.votes: Future[list[Votes]] = Future()
        self.waiting = deque(batches)  # not begun
        self._left = len(self.waiting)  # not counted
        self._lock = threading.Lock()
        self._counts: list[Votes] = [
            np.zeros(classes if task.draw.beta is None else (classes, SOFT_LEVELS), dtype=np.int64) for task in tasks
        ]
        if not self._left:
            self.votes.set_result(self._counts)

    @property
    def over(self) -> bool:
        """Whether nobody waits for the votes: the call has failed, or was cancelled."""
        return self.votes.done()

    def count(self, batch: Batch, logits: npt.NDArray[np.float32]) -> None:
        """Counts the votes of a pass; the rows of `logits` are its copies, in order."""
        counted, at = [], 0
        for i, piece in batch:
            rows = logits[at : at + len(piece)]
            at += len(piece)
            counted.append((i, hard_votes(rows) if piece.beta is None else soft_votes(rows, piece.beta)))
        with self._lock:
            for i, votes in counted:
                self._counts[i] += votes
            self._left -= 1
            if not self._left and self._ends():
                self.votes.set_result(self._counts)

    def fail(self, error: BaseException) -> None:
        """Ends the call by the error of one of its passes."""
        with self._lock:
            if self._ends():
                self.votes.set_exception(error)

    def _ends(self) -> bool:
        """Returns whether somebody still waits. If so, the call cannot be cancelled any more."""
        return not self.votes.done() and self.votes.set_running_or_notify_cancel()


class Calls:
    """Calls that have passes to be made."""

    def __init__(self) -> None:
        self._calls: dict[Call, None] = {}  # in the order of arrival
        self._made = itertools.count(1)
        self._lock = threading.Lock()

    def add(self, call: Call) -> None:
        """Takes a call with all its passes."""
        if call.waiting:
            with self._lock:
                self._calls[call] = None

    def next_pass(self) -> tuple[Call, Batch] | None:
        """Returns the next pass: of the call whose turn is first, or of the one that has waited longest.

        Returns None if nothing waits, because calls were given up.
        """
        with self._lock:
            for call in [call for call in self._calls if call.over]:
                del self._calls[call]
            if not self._calls:
                return None
            oldest = next(self._made) % _PATIENCE == 0
            call = next(iter(self._calls)) if oldest else min(self._calls, key=lambda call: call.turn)
            batch = call.waiting.popleft()
            if not call.waiting:
                del self._calls[call]
            return call, batch

    def cancel(self) -> None:
        """Cancels the calls that have passes to be made."""
        with self._lock:
            waiting = list(self._calls)
            self._calls.clear()
        for call in waiting:
            if call.votes.cancel():
                call.votes.set_running_or_notify_cancel()  # or `concurrent.futures.wait` would sleep on


def hard_votes(logits: npt.NDArray[np.float32]) -> Votes:
    """Returns how many rows of `[k, classes]` each class wins, int64 `[classes]`; of equal logits the first wins."""
    return np.bincount(logits.argmax(1), minlength=logits.shape[1])


def soft_votes(logits: npt.NDArray[np.float32], beta: float) -> Votes:
    """Returns how many rows give each class a softmax(beta * logits) of each level: int64 `[classes, SOFT_LEVELS]`."""
    scaled = beta * logits.astype(np.float64)
    z = np.exp(scaled - scaled.max(1, keepdims=True))
    z /= z.sum(1, keepdims=True)
    levels = np.minimum((z * SOFT_LEVELS).astype(np.int64), SOFT_LEVELS - 1)
    classes = logits.shape[1]
    slots = levels + np.arange(classes) * SOFT_LEVELS
    return np.bincount(slots.ravel(), minlength=classes * SOFT_LEVELS).reshape(classes, SOFT_LEVELS)
