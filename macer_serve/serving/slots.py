"""The places of requests in work: how many there are at most, and when the last one has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from macer_serve.serving.problems import DrainingError, OverloadedError


class RequestSlots:
    """At most `limit` requests in work, and none that is new once `draining` is set."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self.draining = False
        self._all_free = asyncio.Event()
        self._all_free.set()

    def refuse_if_draining(self) -> None:
        """Raises `DrainingError` if the server is about to end."""
        if self.draining:
            raise DrainingError("the server is shutting down; try again shortly")

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Holds one slot until the context ends. Raises `OverloadedError` if all are taken, and as above."""
        self.refuse_if_draining()
        if self._taken >= self._limit:
            raise OverloadedError(f"{self._taken} requests are in work already; try again shortly")
        self._taken += 1
        self._all_free.clear()
        try:
            yield
        finally:
            self._taken -= 1
            if not self._taken:
                self._all_free.set()

    async def until_all_are_free(self) -> None:
        """Returns when no request is in work."""
        await self._all_free.wait()
