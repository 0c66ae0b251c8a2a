"""Faults of a server's processes, and their memory, while a load runs. Only processes of that server are touched."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator

import psutil
from own_server import Server

MB = 2**20
_FLAT_MB, _FLAT_SHARE = 16.0, 0.05  # growth that still counts as flat
_LOADING_S = 30.0  # in which a process of Ray, after a kill, still loads its modules


class Faults:
    """Kills a voter every so often, the ingress once, and stops a voter for a while; remembers when."""

    def __init__(self, server: Server) -> None:
        self._server, self._voter = server, f"voter-{server.model}"
        self.voters: list[float] = []  # when each was killed, seconds of the monotonic clock
        self.ingress: list[float] = []
        self.hung: list[float] = []
        self.back: list[float] = []  # seconds until as many voters were there again

    @contextlib.asynccontextmanager
    async def happening(
        self, *, every_s: float, ingress_after_s: float | None, hang_after_s: float | None, hang_s: float
    ) -> AsyncIterator[None]:
        """Lets the faults happen for as long as the context lasts."""
        tasks = [asyncio.create_task(self._kill_voters(every_s))]
        if ingress_after_s is not None:
            tasks.append(asyncio.create_task(self._kill_ingress(ingress_after_s)))
        if hang_after_s is not None:
            tasks.append(asyncio.create_task(self._hang(hang_after_s, hang_s)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in tasks:
                if not task.cancelled() and (error := task.exception()):
                    raise error

    async def _replicas(self, deployment: str) -> list[psutil.Process]:
        return await asyncio.to_thread(self._server.replicas, deployment)

    async def _kill_voters(self, every_s: float) -> None:
        wanted = len(await self._replicas(self._voter))
        while True:
            await asyncio.sleep(every_s)
            living = await self._replicas(self._voter)
            if not living:
                continue  # the one that was killed before has no successor yet
            living[0].send_signal(signal.SIGKILL)
            self.voters.append(time.monotonic())
            await asyncio.sleep(1)
            while len(await self._replicas(self._voter)) < wanted:
                await asyncio.sleep(0.5)
            self.back.append(time.monotonic() - self.voters[-1])

    async def _kill_ingress(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        (await self._replicas("ingress"))[0].send_signal(signal.SIGKILL)
        self.ingress.append(time.monotonic())

    async def _hang(self, after_s: float, hang_s: float) -> None:
        await asyncio.sleep(after_s)
        process = (await self._replicas(self._voter))[-1]  # the youngest: the oldest is killed next
        process.send_signal(signal.SIGSTOP)
        self.hung.append(time.monotonic())
        try:
            await asyncio.sleep(hang_s)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


class Memory:
    """Private memory of each role's largest process, sampled over time. Those that have just started are left out."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._samples: dict[str, list[tuple[float, float]]] = defaultdict(list)  # seconds since the start, MB

    @contextlib.asynccontextmanager
    async def sampled(self, every_s: float) -> AsyncIterator[None]:
        """Samples for as long as the context lasts."""
        task = asyncio.create_task(self._sample(every_s, time.monotonic()))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _sample(self, every_s: float, began: float) -> None:
        while True:
            for role, size in (await asyncio.to_thread(self._sizes)).items():
                self._samples[role].append((time.monotonic() - began, size))
            await asyncio.sleep(every_s)

    def _sizes(self) -> dict[str, float]:
        sizes: dict[str, float] = defaultdict(float)
        for role, process in self._server.processes():
            with contextlib.suppress(psutil.Error):
                if time.time() - process.create_time() < _LOADING_S:
                    continue
                memory = process.memory_info()
                sizes[role] = max(sizes[role], (memory.rss - memory.shared) / MB)
        return dict(sizes)

    def table(self, settle_s: float) -> tuple[list[str], bool]:
        """Returns a line per role, and whether every one is flat after `settle_s`.

        The first and the last quarter of what follows are compared, by their medians. Flat is a growth of at most 5 %
        or 16 MB.
        """
        lines, flat = [f"{'process':24} {'MB then':>8} {'MB last':>8} {'largest':>8}"], True
        for role, samples in sorted(self._samples.items()):
            later = [size for at, size in samples if at >= settle_s]
            if len(later) < 4:
                continue  # a process of a moment
            quarter = max(1, len(later) // 4)
            first, last = statistics.median(later[:quarter]), statistics.median(later[-quarter:])
            grows = last - first > max(_FLAT_MB, _FLAT_SHARE * first)
            flat &= not grows
            lines.append(f"{role:24} {first:8.0f} {last:8.0f} {max(later):8.0f}{'  grows' if grows else ''}")
        return lines, flat
