"""Uploads that are sent a byte a second, as an attacker does who wants a server's places for nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from own_server import Server

_PEERS = 50  # addresses of this machine that the uploads come from


class SlowUploads:
    """Connections that each send the head of an upload and then one byte a second."""

    def __init__(self, server: Server, count: int) -> None:
        self._host, port = server.url.removeprefix("http://").rsplit(":", 1)
        self._port, self._count = int(port), count
        self.open = self.closed = 0

    @contextlib.asynccontextmanager
    async def sending(self) -> AsyncIterator[SlowUploads]:
        """Keeps the uploads going for as long as the context lasts."""
        tasks = [asyncio.create_task(self._one(i)) for i in range(self._count)]
        try:
            await asyncio.sleep(2)
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, number: int) -> None:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 5000\r\n\r\n"
        source = (f"127.0.1.{1 + number % _PEERS}", 0)
        while True:
            writer = None
            try:
                reader, writer = await asyncio.open_connection(self._host, self._port, local_addr=source)
                self.open += 1
                writer.write(head)
                ended = asyncio.create_task(reader.read(1))  # an answer, or the end of the connection
                while not ended.done():
                    writer.write(b"\x89")
                    await writer.drain()
                    await asyncio.wait((ended,), timeout=1)
                ended.exception()
            except OSError:
                pass  # the server may well refuse such a client: it comes again
            finally:
                if writer is not None:
                    self.open -= 1
                    writer.close()
            self.closed += 1
            await asyncio.sleep(1)
