"""What signals ask of a running `macer serve`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class Signals:
    """`stop` is set by the first SIGTERM or SIGINT, `change` by SIGHUP. A second one to stop ends the process at once.

    If the terminal in which the process was started is closed, SIGHUP means that the server shall end; unless it was
    ignored at the start, as `nohup` does.
    """

    def __init__(self) -> None:
        self.stop, self.change = threading.Event(), threading.Event()
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._ends_with_terminal = not ignored and _has_terminal()

    @contextmanager
    def handled(self) -> Iterator[Signals]:
        """Handles the signals until the block ends."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        self.handle()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle(self) -> None:
        """Puts these handlers in place of any others."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, self._hang_up)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set():
            os._exit(128 + number)  # Ray's processes end with this one
        self.stop.set()

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        if self._ends_with_terminal and not _has_terminal():
            self._stop(number, frame)
        else:
            self.change.set()


def _has_terminal() -> bool:
    """Returns whether this process has a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
