"""What runs in Serve's HTTP proxy against overload: it repeats a refusal that the ingress has just given.

A refusal by the ingress costs 10 to 20 milliseconds of processor time, most of it in Serve. Clients who come back too
early would take the time of the answers that they wait for. The proxy refuses one of them in about a tenth of that.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from macer_serve.serving.problems import TIME_IN
from macer_serve.serving.upload_limits import has_body
from macer_serve.serving.whole_uploads import came_whole

REPEATED_S = 2.0  # at most, for which a refusal is repeated
_KINDS = 100  # of requests whose refusals are remembered
_DECIDING = (b"host", b"origin", b"sec-fetch-site")  # headers by which the ingress chooses its answer or its headers

Kind: TypeAlias = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A refusal of the ingress. Moments are those of the event loop's clock."""

    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    repeated_until: float
    time_at: float  # from then on there will be time

    async def repeat(self, now: float, send: Send) -> None:
        retry_after_s = max(1, math.ceil(self.time_at - now))
        headers = [*self.headers, (b"retry-after", str(retry_after_s).encode())]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class RepeatRefusals:
    """Refuses a request like one that the ingress has just refused (429); `Retry-After` says how much time is left.

    Requests are alike if their path and query are the same, which say how many votes are asked for by when. Of the
    upload, nothing counts but that it came whole. A refusal is repeated until a request that is in work has ended, for
    half of the time until the ingress expects to have time, and for `REPEATED_S` seconds at most.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._refusals: OrderedDict[Kind, _Refusal] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self._app(scope, receive, send)
            return
        kind, now = _kind(scope), asyncio.get_running_loop().time()
        refusal = self._refusals.get(kind) if came_whole(scope) else None
        if refusal is not None and now < refusal.repeated_until:
            await refusal.repeat(now, send)
            return
        answer, refusals = _Answer(send), self._refusals
        try:
            await self._app(scope, receive, answer)
        finally:
            if answer.status != 429:
                self._refusals = OrderedDict()  # there may be time now
            elif answer.ended and answer.time_in is not None:
                _note(refusals, kind, answer, answer.time_in)  # in vain if these have been forgotten meanwhile


class _Answer:
    """The sending side of one request. If it is a refusal that may be repeated, its headers and its body are kept."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.time_in: float | None = None  # seconds; set if the refusal may be repeated
        self.headers: list[tuple[bytes, bytes]] = []
        self.body, self.ended = bytearray(), False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message.get("headers", []))
            if self.status == 429 and TIME_IN in headers:
                self.time_in = float(headers[TIME_IN])
                kept = [(name, value) for name, value in message["headers"] if name != TIME_IN]
                self.headers = [(name, value) for name, value in kept if name not in (b"retry-after", b"x-request-id")]
                message = {**message, "headers": kept}
        elif self.time_in is not None:
            self.body += message.get("body", b"")
            self.ended = not message.get("more_body", False)
        await self._send(message)


def _note(refusals: OrderedDict[Kind, _Refusal], kind: Kind, answer: _Answer, time_in_s: float) -> None:
    now = asyncio.get_running_loop().time()
    until = now + min(REPEATED_S, time_in_s / 2)
    refusals[kind] = _Refusal(tuple(answer.headers), bytes(answer.body), until, now + time_in_s)
    refusals.move_to_end(kind)
    if len(refusals) > _KINDS:
        refusals.popitem(last=False)


def _kind(scope: Scope) -> Kind:
    """Returns what requests have in common that the ingress refuses alike."""
    deciding = tuple((name, value) for name, value in scope["headers"] if name in _DECIDING)
    where = (scope["method"], scope["http_version"], scope.get("root_path", ""), scope["path"], scope["query_string"])
    return (*where, *deciding)
