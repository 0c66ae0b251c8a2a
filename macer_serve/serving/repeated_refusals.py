"""What runs in Serve's HTTP proxy against overload: it repeats a refusal that the application has just given.

A refusal costs the application as much as any small answer: 10 to 20 milliseconds of processor time, most of it in
Serve. Clients who come back too early would take the time of the answers that they wait for. In the proxy, refusing one
of them costs a tenth of that.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from macer_serve.serving.whole_uploads import came_whole

REPEATED_S = 2.0  # at most, for which a refusal is repeated
LEAST_S = 2.0  # refusals that name fewer seconds are not about the work that waits
_BODY_BYTES = 64 * 2**10  # of a refusal that is remembered
_KINDS = 1_000  # of requests whose refusals are remembered
_DECIDING = (b"host", b"origin", b"sec-fetch-site")  # headers by which the application chooses its answer or headers

Kind: TypeAlias = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A refusal of the application. Moments are those of the event loop's clock."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    repeated_until: float
    time_at: float  # the moment at which there will be time, by `Retry-After`

    async def repeat(self, now: float, send: Send) -> None:
        left_s = max(1, math.ceil(self.time_at - now))
        headers = [*self.headers, (b"retry-after", str(left_s).encode())]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class RepeatRefusals:
    """Refuses a request like one that the application has just refused for want of time (429).

    Requests are alike if their path and query are the same, which say how many votes are asked for by when; of the
    upload, nothing counts but that it came whole. A refusal is repeated for half of the seconds that its `Retry-After`
    names, and for `REPEATED_S` at most: if other clients leave, there may be time earlier. What is left of these
    seconds is said.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._refusals: OrderedDict[Kind, _Refusal] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not came_whole(scope):
            await self._app(scope, receive, send)
            return
        kind, now = _kind(scope), asyncio.get_running_loop().time()
        refusal = self._refusals.get(kind)
        if refusal is not None and now < refusal.repeated_until:
            await refusal.repeat(now, send)
            return
        await self._app(scope, receive, self._noting(kind, send))

    def _noting(self, kind: Kind, send: Send) -> Send:
        """Returns a `send` that takes note of a refusal."""
        start: Message | None = None
        body = b""

        async def noting(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] == 429:
                start = message
            elif message["type"] == "http.response.body" and start is not None and len(body) <= _BODY_BYTES:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    self._note(kind, start, body)
            await send(message)

        return noting

    def _note(self, kind: Kind, start: Message, body: bytes) -> None:
        headers = [(name.lower(), value) for name, value in start.get("headers", [])]
        said = dict(headers).get(b"retry-after", b"")
        if not said.isdigit() or int(said) < LEAST_S or len(body) > _BODY_BYTES:
            return
        kept = tuple((name, value) for name, value in headers if name not in (b"retry-after", b"x-request-id"))
        now = asyncio.get_running_loop().time()
        self._refusals[kind] = _Refusal(kept, body, now + min(REPEATED_S, int(said) / 2), now + int(said))
        self._refusals.move_to_end(kind)
        if len(self._refusals) > _KINDS:
            self._refusals.popitem(last=False)


def _kind(scope: Scope) -> Kind:
    """Returns what requests have in common that the application refuses alike."""
    deciding = tuple((name, value) for name, value in scope["headers"] if name in _DECIDING)
    return (scope["method"], scope.get("root_path", ""), scope["path"], scope["query_string"], *deciding)
