"""Limits of uploads in progress: their time, their rate, and how many there are of each client and in all."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from macer_serve.serving.problems import ClientLeftError, OverloadedError, SlowUploadError
from macer_serve.serving.whole_uploads import came_whole

GRACE_S = 5.0  # before the rate of an upload counts
STALLED_S = 0.5  # without a byte, after which an upload may have to make room


@dataclass(slots=True, eq=False)
class _Upload:
    """An upload in progress. Its timer is set to the moment at which it will have been too slow."""

    peer: str
    began: float  # seconds of the event loop's clock, as all moments here
    timer: asyncio.Timeout
    latest: float  # the moment of its latest bytes
    displaced: bool = False

    @property
    def due(self) -> float:
        """The moment at which the upload is ended if no more bytes come."""
        due = self.timer.when()
        assert due is not None
        return due


class Uploads:
    """The uploads in progress of one ingress replica.

    An upload is ended `GRACE_S` seconds and one second per `rate` bytes after it began, and after `timeout_s` seconds
    in any case. If there are too many, one makes room for the new one: the one that has sent nothing for longest, if
    that is `STALLED_S` or more, else the one that is nearest to its end, if it is slower than `rate`. Otherwise the new
    one is refused. Hence clients that send slowly, or little and then nothing, never keep out one that sends at once.
    """

    def __init__(self, *, timeout_s: float, rate: float, per_client: int, in_all: int) -> None:
        self._timeout_s, self._rate = timeout_s, rate
        self._per_client, self._in_all = per_client, in_all
        self._uploads: set[_Upload] = set()

    async def read(self, request: Request, read: Callable[[Request], Awaitable[bytes]]) -> bytes:
        """Returns what `read` makes of the request. An upload that came whole does not count against the limits.

        Raises `SlowUploadError` if the upload is too slow or had to make room, and `OverloadedError` if there is none.
        """
        if came_whole(request.scope):
            return await read(request)
        with self._admitted(peer_of(request)) as upload:
            try:
                async with upload.timer:
                    return await read(Request(request.scope, self._watched(request, upload)))
            except ClientDisconnect:
                raise ClientLeftError("the client has left") from None
            except TimeoutError:
                if upload.displaced:
                    raise SlowUploadError("too many uploads at once, and this one was the slowest") from None
                raise SlowUploadError(
                    f"the upload is too slow: after {GRACE_S:g} s it must come at {self._rate:g} bytes per second, "
                    f"and it must be complete after {self._timeout_s:g} s"
                ) from None

    @contextmanager
    def _admitted(self, peer: str) -> Iterator[_Upload]:
        """Holds the place of an upload. Raises `OverloadedError` if there is none."""
        now = asyncio.get_running_loop().time()
        upload = _Upload(peer, now, asyncio.timeout_at(self._due(now, 0)), now)
        self._make_room([other for other in self._uploads if other.peer == peer], self._per_client, upload)
        self._make_room(list(self._uploads), self._in_all, upload)
        self._uploads.add(upload)
        try:
            yield upload
        finally:
            self._uploads.discard(upload)

    def _make_room(self, uploads: list[_Upload], limit: int, new: _Upload) -> None:
        """Ends one upload if there are `limit`. Raises `OverloadedError` if none is slow."""
        uploads = [other for other in uploads if not other.displaced]
        if len(uploads) < limit:
            return
        leaves = min(uploads, key=lambda other: other.latest)
        if new.began - leaves.latest < STALLED_S:  # none has stalled
            leaves = min(uploads, key=lambda other: other.due)
            if leaves.due >= new.due:
                raise OverloadedError(f"{len(uploads)} uploads are in progress already; try again shortly")
        leaves.displaced = True
        leaves.timer.reschedule(0)

    def _due(self, began: float, received: int) -> float:
        return began + min(self._timeout_s, GRACE_S + received / self._rate)

    def _watched(self, request: Request, upload: _Upload) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """Returns the request's `receive`, which moves the upload's end as its bytes come."""
        received = 0

        async def receive() -> MutableMapping[str, Any]:
            nonlocal received
            message = await request.receive()
            received += len(message.get("body", b""))
            upload.latest = asyncio.get_running_loop().time()
            if not upload.displaced and not upload.timer.expired():
                upload.timer.reschedule(self._due(upload.began, received))
            return message

        return receive


def peer_of(request: Request) -> str:
    """Returns the client's address; of IPv6, the network of 64 bits, in which one client has all addresses.

    Serve's proxy takes it from `X-Forwarded-For` if a reverse proxy that it trusts has sent the request.
    """
    host = request.client.host if request.client is not None else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def has_body(scope: Scope) -> bool:
    """Returns whether a request of this scope brings a body."""
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
