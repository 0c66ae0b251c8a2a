"""What runs in Serve's HTTP proxy against clients that send slowly: it waits for uploads until they are whole.

An upload that the application refuses costs about five milliseconds of processor time: a request to the application,
and its answer. A client that connects again after each refusal could thus take much of the server's time by sending a
few bytes a second. In the proxy, waiting for it costs nearly nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from macer_serve.serving.problems import SlowUploadError, problem
from macer_serve.serving.upload_limits import STALLED_S, peer_of
from macer_serve.serving.whole_uploads import with_body

SLOW_S = 60.0  # for which a client is known to be slow
HELD_S = 10.0  # in which an upload of a slow client must have come
HELD_BYTES = 256 * 2**10  # of an upload that are enough to pass it on
HELD = 1_000  # uploads that are held at a time, in all
HELD_PER_CLIENT = 32  # of a slow client
PACE_S = 0.02  # between two uploads that are passed on unfinished
_CLIENTS = 10_000  # that are remembered

_REFUSAL = problem(
    408,
    SlowUploadError.title,
    f"the upload is too slow: after earlier ones that were, it must come within {HELD_S:g} s",
    {"connection": "close"},  # who still sends is not listened to
)


class HoldSlowUploads:
    """Holds uploads until they are whole, for half a second. Those of slow clients have longer, and are refused then.

    A whole upload goes to the application with its request. Others are the application's to read. They are passed on
    one by one, so that a flood of them leaves the application time for its answers.

    A client is slow if the application has ended an upload of it as too slow, or if it has left such an upload. Others
    of its address are served as before if they send what they have at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._slow_until: OrderedDict[str, float] = OrderedDict()  # the event loop's time, by client
        self._held: Counter[str] = Counter()  # uploads, by client
        self._next_at = 0.0  # the event loop's time at which the next unfinished upload may be passed on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        peer, upload = peer_of(Request(scope)), _Upload(receive, send)
        if not await self._may_pass(peer, upload):
            await _REFUSAL(scope, receive, send)  # nobody reads it if the client has left
            return
        if (body := upload.whole()) is not None:
            scope = with_body(scope, body)
        try:
            await self._app(scope, upload.receive, upload.send)
        finally:
            if upload.was_slow:
                self._note(peer)

    def _note(self, peer: str) -> None:
        self._slow_until[peer] = asyncio.get_running_loop().time() + SLOW_S
        self._slow_until.move_to_end(peer)
        if len(self._slow_until) > _CLIENTS:
            self._slow_until.popitem(last=False)

    async def _may_pass(self, peer: str, upload: _Upload) -> bool:
        """Returns whether the upload is to go on. If too many are held, it is not waited for."""
        full = self._held.total() >= HELD or (self._is_slow(peer) and self._held[peer] >= HELD_PER_CLIENT)
        self._held[peer] += 1
        try:
            if full:
                return await upload.hold(0.0) is not False  # the application's own limits let others displace it
            if not self._is_slow(peer):
                if (came := await upload.hold(STALLED_S)) is None:
                    came = await upload.hold(self._turn())
                if came is not None or not self._is_slow(peer):
                    return came is not False
            return bool(await upload.hold(HELD_S))
        finally:
            self._held[peer] -= 1
            if not self._held[peer]:
                del self._held[peer]

    def _is_slow(self, peer: str) -> bool:
        return self._slow_until.get(peer, 0.0) > asyncio.get_running_loop().time()

    def _turn(self) -> float:
        """Returns the seconds until the turn of one more unfinished upload comes."""
        now = asyncio.get_running_loop().time()
        turn = max(now, self._next_at)
        self._next_at = turn + PACE_S
        return turn - now


class _Upload:
    """The two sides of a request with a body."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._held: bytearray | None = None  # of the body; the application has not got it yet
        self._complete = False
        self.began = asyncio.get_running_loop().time()
        self.was_slow = False

    async def hold(self, seconds: float) -> bool | None:
        """Returns True once the body is complete, or enough of it has come, and False once its client has left.

        Returns None after so many seconds; what is there already is taken in any case.
        """
        held = self._held = bytearray() if self._held is None else self._held
        try:
            async with asyncio.timeout(seconds):
                while not self._complete and len(held) < HELD_BYTES:
                    message = await self._next()
                    if message["type"] == "http.disconnect":
                        return False
                    held += message.get("body", b"")
        except TimeoutError:
            return None
        return True

    def whole(self) -> bytes | None:
        """Returns the body if it is complete. It is not received any more then."""
        if not self._complete or self._held is None:
            return None
        body, self._held = bytes(self._held), None
        return body

    async def receive(self) -> Message:
        if self._held is not None:
            body, self._held = bytes(self._held), None
            return {"type": "http.request", "body": body, "more_body": not self._complete}
        return await self._next()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 408 and not self._complete:
            self.was_slow = True
        await self._send(message)

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            late = asyncio.get_running_loop().time() - self.began >= STALLED_S
            self.was_slow = self.was_slow or (late and not self._complete)
        else:
            self._complete = self._complete or not message.get("more_body", False)
        return message


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
