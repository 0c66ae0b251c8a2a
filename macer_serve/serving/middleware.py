"""Middleware that reads the rest of refused request bodies, and that answers pages of other origins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import ClassVar

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from macer_serve.serving.problems import problem
from macer_serve.serving.upload_limits import has_body

READ_ON_BYTES = 64 * 2**20  # of a refused body
READ_ON_S = 30.0
READ_ON_RATE = 64 * 2**10  # bytes per second
IDLE_S = 2.0  # a client that sends nothing for so long waits for the answer


class DrainRequestBody:
    """Reads what is left of a request's body before the answer begins, within bounds.

    Most clients read no answer before they have sent their whole request. If the server stopped reading, they would see
    a broken connection in place of the 413.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unread = has_body(scope)

        async def tracked() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            nonlocal unread
            if unread and message["type"] == "http.response.start":
                unread = False
                await _read_on(receive)
            await send(message)

        await self._app(scope, tracked, answer)


async def _read_on(receive: Receive) -> None:
    """Returns at the end of the body, or when one of the bounds above is reached."""
    read, began = 0, asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(began + READ_ON_S):
            while read < READ_ON_BYTES:
                # Whoever sends slowly on purpose is not waited for.
                async with asyncio.timeout_at(began + IDLE_S + read / READ_ON_RATE):
                    message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
                read += len(message.get("body", b""))
    except TimeoutError:
        return


class Cors(CORSMiddleware):
    """Lets pages of the configured origins use the server; without any, answers as if this class were not there."""

    origins: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            app,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("Content-Type", "X-Request-ID"),
            expose_headers=("Retry-After", "X-Request-ID"),
        )

    @classmethod
    def allow(cls, origins: Iterable[str]) -> None:
        """Sets the origins for this process; `*` stands for every origin."""
        cls.origins = frozenset(origins)

    def is_allowed_origin(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        headers = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return problem(answer.status_code, "Bad Request", bytes(answer.body).decode(), headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (super().__call__ if self.origins else self.app)(scope, receive, send)
