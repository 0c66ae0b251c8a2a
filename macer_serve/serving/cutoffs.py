"""Certifications that end early because the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Cutoffs:
    """One end for all that runs in `applied`, for as long as none is set: never."""

    def __init__(self) -> None:
        self._end: float | None = None  # in the event loop's time
        self._running: set[asyncio.Timeout] = set()

    def set(self, seconds: float) -> None:
        """Ends everything that runs after so many seconds, and what begins later too."""
        self._end = asyncio.get_running_loop().time() + seconds
        for timeout in self._running:
            timeout.reschedule(self._end)

    @asynccontextmanager
    async def applied(self) -> AsyncIterator[None]:
        """Raises `TimeoutError` from the block at the end that is set."""
        async with asyncio.timeout_at(self._end) as timeout:
            self._running.add(timeout)
            try:
                yield
            finally:
                self._running.discard(timeout)
