"""Limits of uploads in progress: slow ones end, and make room for those that are not slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.requests import Request

from macer_serve.serving.problems import ClientLeftError, OverloadedError, SlowUploadError
from macer_serve.serving.upload_limits import GRACE_S, STALLED_S, Uploads, peer_of


class Client:
    """A client at an address, whose request gets the pieces that it sends."""

    def __init__(self, address: str = "192.0.2.1") -> None:
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.request = Request({"type": "http", "client": (address, 1), "headers": []}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        if (piece := await self.pieces.get()) is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": piece != b""}

    def send(self, *pieces: bytes | None) -> Client:
        for piece in pieces:
            self.pieces.put_nowait(piece)
        return self


def uploads(**changes: Any) -> Uploads:
    return Uploads(**{"timeout_s": 60, "rate": 1000, "per_client": 2, "in_all": 4, **changes})


def reading(limits: Uploads, client: Client) -> asyncio.Task[bytes]:
    return asyncio.create_task(limits.read(client.request, Request.body))


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@in_a_loop
async def test_an_upload_is_read_whole() -> None:
    assert await uploads().read(Client().send(b"ab", b"c", b"").request, Request.body) == b"abc"


@in_a_loop
async def test_an_upload_ends_after_its_time_however_fast_it_comes() -> None:
    client = Client().send(*[b"x" * 10_000] * 5)
    with pytest.raises(SlowUploadError, match=r"complete after 0\.05 s"):
        await uploads(timeout_s=0.05).read(client.request, Request.body)


@in_a_loop
async def test_the_end_of_an_upload_moves_with_its_bytes() -> None:
    """At 1,000 bytes per second, 2,000 bytes are worth two seconds."""
    limits = uploads()
    began = asyncio.get_running_loop().time()
    task = reading(limits, Client().send(b"x" * 2000))
    await settle()
    (upload,) = limits._uploads
    assert upload.due == pytest.approx(began + GRACE_S + 2, abs=0.5)
    task.cancel()


@in_a_loop
async def test_an_upload_that_does_not_come_makes_room_for_another() -> None:
    limits, stalled = uploads(), [Client(), Client()]
    tasks = [reading(limits, client) for client in stalled]
    await settle()
    assert await limits.read(Client().send(b"x", b"").request, Request.body) == b"x"
    with pytest.raises(SlowUploadError, match="slowest"):
        await tasks[0]
    assert not tasks[1].done()
    assert await limits.read(Client("192.0.2.2").send(b"").request, Request.body) == b""
    tasks[1].cancel()


@in_a_loop
async def test_uploads_of_one_client_leave_those_of_others_alone() -> None:
    limits, other = uploads(per_client=2, in_all=9), Client("192.0.2.9")
    its = reading(limits, other)
    await settle()
    tasks = [reading(limits, Client()) for _ in range(20)]
    await settle()
    other.send(b"whole", b"")
    assert await its == b"whole"
    assert sum(task.done() for task in tasks) == 18
    for task in tasks:
        task.cancel()
    assert {type(e) for e in await asyncio.gather(*tasks, return_exceptions=True)} == {
        SlowUploadError,
        asyncio.CancelledError,
    }


@in_a_loop
async def test_uploads_that_come_fast_are_not_ended_for_a_new_one() -> None:
    limits, clients = uploads(), [Client().send(b"x" * 100_000), Client().send(b"x" * 100_000)]
    tasks = [reading(limits, client) for client in clients]
    await settle()
    with pytest.raises(OverloadedError, match="in progress already"):
        await limits.read(Client().request, Request.body)
    for client in clients:
        client.send(b"")
    assert [len(await task) for task in tasks] == [100_000, 100_000]


@in_a_loop
async def test_uploads_that_sent_much_and_then_nothing_make_room() -> None:
    """Their rate would let them stay for half a minute."""
    limits, clients = uploads(), [Client().send(b"x" * 30_000), Client().send(b"x" * 30_000)]
    tasks = [reading(limits, client) for client in clients]
    await asyncio.sleep(STALLED_S + 0.1)
    clients[0].send(b"y")
    await settle()
    assert await limits.read(Client().send(b"z", b"").request, Request.body) == b"z"
    with pytest.raises(SlowUploadError, match="slowest"):
        await tasks[1]
    clients[0].send(b"")
    assert len(await tasks[0]) == 30_001


@in_a_loop
async def test_a_client_that_leaves_is_no_defect() -> None:
    with pytest.raises(ClientLeftError):
        await uploads().read(Client().send(b"x", None).request, Request.body)


@pytest.mark.parametrize(
    ("address", "peer"),
    [("192.0.2.1", "192.0.2.1"), ("2001:db8::1", "2001:db8::/64"), ("2001:db8::ffff", "2001:db8::/64"), ("?", "?")],
)
def test_a_client_is_an_address_or_a_network_of_64_bits(address: str, peer: str) -> None:
    assert peer_of(Request({"type": "http", "client": (address, 1), "headers": []})) == peer
