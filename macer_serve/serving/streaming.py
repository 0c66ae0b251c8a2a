"""Server-sent events: the certificate as it grows, each state of it valid by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from macer_serve.errors import MacerError
from macer_serve.serving import problems
from macer_serve.serving.problems import ClientLeftError

Certify = Callable[[Callable[[BaseModel], None]], Coroutine[None, None, BaseModel]]


class EventStream(EventSourceResponse):
    """A stream of events that releases its request slot when it ends, however it ends."""

    def __init__(self, events: AsyncIterator[bytes], release: Callable[[], Awaitable[object]]) -> None:
        # Proxies that collect a response before they pass it on would defeat its purpose.
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._release()


async def events(certify: Certify, where: str) -> AsyncIterator[bytes]:
    """`progress` events while `certify` runs, then one `result`, or one `error` with a problem document.

    `certify` is given a function to report progress by. A slow reader misses states, never the last one; closing
    the iterator cancels the work.
    """
    states: asyncio.Queue[BaseModel | None] = asyncio.Queue()
    work = asyncio.ensure_future(certify(states.put_nowait))
    work.add_done_callback(lambda _: states.put_nowait(None))
    try:
        while (state := await _latest(states)) is not None:
            yield format_sse_event(event="progress", data_str=state.model_dump_json())
        try:
            yield format_sse_event(event="result", data_str=(await work).model_dump_json())
        except ClientLeftError:
            return
        except MacerError as error:
            yield format_sse_event(event="error", data_str=json.dumps(problems.document_for(error)))
        except Exception:
            yield format_sse_event(event="error", data_str=json.dumps(problems.unforeseen(where)))
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def _latest(states: asyncio.Queue[BaseModel | None]) -> BaseModel | None:
    """Returns the newest state, or None after the work has ended and the last state was read."""
    state = await states.get()
    while state is not None and not states.empty():
        if (newer := states.get_nowait()) is None:
            states.put_nowait(None)
            break
        state = newer
    return state
