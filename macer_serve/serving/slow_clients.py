"""What runs in Serve's HTTP proxy against clients that send slowly: it waits for uploads until they are whole.

An upload that the application refuses costs 5 to 20 milliseconds of processor time: a request to the application, and
its answer. A client that connects again after each refusal could thus take much of the server's time by sending a
few bytes a second. In the proxy, waiting for it costs nearly nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from macer_serve.errors import MacerError
from macer_serve.serving.problems import OverloadedError, SlowUploadError, problem_of
from macer_serve.serving.upload_limits import STALLED_S, has_body, peer_of
from macer_serve.serving.whole_uploads import with_whole

SLOW_S = 60.0  # for which a client is known to be slow
HELD_S = 10.0  # in which an upload of a slow client must have come
HELD_BYTES = 256 * 2**10  # of an upload that are enough to pass it on
HELD = 1_000  # uploads that are held at a time, in all
HELD_PER_CLIENT = 32  # of a slow client; another one may have half of all
PACE_S = 0.5  # between two uploads that are passed on unfinished
_CLIENTS = 10_000  # that are remembered


class HoldSlowUploads:
    """Holds uploads until they are whole, for half a second. Those of slow clients have longer, and are refused then.

    A whole upload goes to the application with its request. Others are the application's to read. They are passed on
    one by one, so that a flood of them leaves the application time for its answers. If too many are held, those that
    are not whole after half a second are refused.

    A client is slow if the application has ended an upload of it as too slow, or if it has left such an upload. Others
    of its address are served as before if they send what they have at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._slow_until: OrderedDict[str, float] = OrderedDict()  # the event loop's time, by client
        self._held: Counter[str] = Counter()  # uploads, by client
        self._waiting: dict[str, set[_Upload]] = {}  # for their turn, by client
        self._next_at = 0.0  # the event loop's time at which the next unfinished upload may be passed on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self._app(scope, receive, send)
            return
        peer, upload = peer_of(Request(scope)), _Upload(receive, send)
        try:
            if (refusal := await self._refusal(peer, upload)) is not None:
                # Nobody reads it if the client has left, and who still sends is not listened to.
                await problem_of(refusal, {"connection": "close"})(scope, receive, send)
                return
            if (body := upload.whole) is not None:
                scope = with_whole(scope, body)
            await self._app(scope, upload.receive, upload.send)
        finally:
            if upload.was_slow:
                self._note(peer)

    def _note(self, peer: str) -> None:
        self._slow_until[peer] = asyncio.get_running_loop().time() + SLOW_S
        self._slow_until.move_to_end(peer)
        if len(self._slow_until) > _CLIENTS:
            self._slow_until.popitem(last=False)
        for upload in self._waiting.get(peer, ()):
            upload.wait_no_longer()  # its turn does not come any more

    async def _refusal(self, peer: str, upload: _Upload) -> MacerError | None:
        """Returns None once the upload may be passed on, or why it is not."""
        slow = self._is_slow(peer)
        full = self._held.total() >= HELD or self._held[peer] >= (HELD_PER_CLIENT if slow else HELD // 2)
        self._held[peer] += 1
        try:
            came = await upload.hold(HELD_S if slow and not full else STALLED_S)
            if came is None and not slow:
                if full:
                    return OverloadedError(f"{self._held.total()} uploads are in progress already; try again shortly")
                came = await self._until_its_turn(peer, upload)
                if came is None:
                    came = await upload.hold(HELD_S)
            late = f"the upload is too slow: after earlier ones that were, it must come within {HELD_S:g} s"
            return None if came else SlowUploadError(late)
        finally:
            self._held[peer] -= 1
            if not self._held[peer]:
                del self._held[peer]

    async def _until_its_turn(self, peer: str, upload: _Upload) -> bool | None:
        """Returns whether an unfinished upload may go on: because it has become whole, or its turn has come.

        Returns None if another upload of its client has turned out to be slow.
        """
        if self._is_slow(peer):
            return None
        now = asyncio.get_running_loop().time()
        turn = max(now, self._next_at)
        self._next_at = turn + PACE_S
        waiting = self._waiting.setdefault(peer, set())
        waiting.add(upload)
        try:
            came = await upload.hold(turn - now)
        finally:
            waiting.discard(upload)
            if not waiting:
                self._waiting.pop(peer, None)
        if came is None and not self._is_slow(peer):
            return True
        self._next_at -= PACE_S  # it needs no turn
        return came

    def _is_slow(self, peer: str) -> bool:
        return self._slow_until.get(peer, 0.0) > asyncio.get_running_loop().time()


class _Upload:
    """The two sides of a request with a body."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._held: bytearray | None = None  # of the body; the application has not got it yet
        self._timer: asyncio.Timeout | None = None  # of `hold`
        self._received = 0
        self._complete = self._answered = False
        self._began = asyncio.get_running_loop().time()
        self.was_slow = False

    async def hold(self, seconds: float) -> bool | None:
        """Waits for the body. Returns True if it is complete or long enough, False if its client has left.

        Returns None if neither has happened after so many seconds.
        """
        held = self._held = bytearray() if self._held is None else self._held
        try:
            async with asyncio.timeout(seconds) as self._timer:
                while not self._complete and len(held) < HELD_BYTES:
                    if (message := await self._next())["type"] == "http.disconnect":
                        return False
                    held += message.get("body", b"")
        except TimeoutError:
            return None
        finally:
            self._timer = None
        return True

    def wait_no_longer(self) -> None:
        """Ends `hold` as if its time were over."""
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time())

    @property
    def whole(self) -> bytes | None:
        """The body if it is complete and the application has not got any of it."""
        return bytes(self._held) if self._complete and self._held is not None else None

    async def receive(self) -> Message:
        if self._held is not None:
            body, self._held = bytes(self._held), None
            return {"type": "http.request", "body": body, "more_body": not self._complete}
        return await self._next()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._answered = True
            self.was_slow = self.was_slow or (message["status"] == 408 and not self._complete)
        await self._send(message)

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            seconds = asyncio.get_running_loop().time() - self._began
            slow = seconds >= STALLED_S and self._received < HELD_BYTES / HELD_S * seconds
            # After an answer, whoever receives is told of a disconnection though the client may be there.
            self.was_slow = self.was_slow or (slow and not self._complete and not self._answered)
        else:
            self._received += len(message.get("body", b""))
            self._complete = self._complete or not message.get("more_body", False)
        return message
