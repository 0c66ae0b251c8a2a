"""The proxy waits for uploads until they are whole, and longer for those of clients that were slow."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from macer_serve.serving import slow_clients
from macer_serve.serving.proxy import ProblemsOnly
from macer_serve.serving.slow_clients import HELD, HELD_BYTES, HELD_PER_CLIENT, HoldSlowUploads
from macer_serve.serving.whole_uploads import ReceiveBodyFromScope, came_whole

SLOW, OTHER = "192.0.2.1", "192.0.2.2"
LEAVES = b"leaves"
STALLED_S, PACE_S = 0.1, 0.02


class Proxy:
    """The middleware around an application that answers `refusal` to what is not complete after a second."""

    def __init__(self) -> None:
        self.asked, self.refusal, self.whole = 0, 408, False
        self.asked_at: list[float] = []
        self.head: Any = None
        self.app: ASGIApp = HoldSlowUploads(ReceiveBodyFromScope(self._application))

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked, self.whole = self.asked + 1, came_whole(scope)
        self.asked_at.append(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(2 * STALLED_S):
                answer = PlainTextResponse(str(len(await Request(scope, receive).body())))
        except TimeoutError:
            answer = PlainTextResponse("too slow", self.refusal)
        await answer(scope, receive, send)
        if answer.status_code != 200:
            await receive()  # as Ray does

    async def send(
        self, peer: str, *pieces: bytes, headers: dict[bytes, bytes] | None = None, after: float = 0.0
    ) -> tuple[int, bytes]:
        """Returns the answer to a client that sends the pieces, `after` seconds; an empty one is the end of the body.

        After the last one it waits; or it leaves, if that is `LEAVES`.
        """
        messages = [
            {"type": "http.disconnect"}
            if piece is LEAVES
            else {"type": "http.request", "body": piece, "more_body": piece != b""}
            for piece in pieces
        ]
        answer: list[Any] = []
        answered = asyncio.Event()

        async def receive() -> Any:
            await asyncio.sleep(after)
            if not messages:
                await answered.wait()
                return {"type": "http.disconnect"}  # uvicorn says so to whoever receives after the answer
            if messages[0]["type"] == "http.disconnect":
                await asyncio.sleep(1.5 * STALLED_S)
            return messages.pop(0)

        async def send(message: Any) -> None:
            answer.append(message)
            if message["type"] == "http.response.body":
                answered.set()

        described = headers if headers is not None else {b"content-length": b"900000"}
        scope = {"type": "http", "client": (peer, 1), "method": "POST", "path": "/", "headers": list(described.items())}
        await self.app(scope, receive, send)
        self.head = answer[0]
        return answer[0]["status"], answer[1]["body"]


def proxied(test: Callable[[Proxy], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test(Proxy()))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_clients, "STALLED_S", STALLED_S)
    monkeypatch.setattr(slow_clients, "PACE_S", PACE_S)
    monkeypatch.setattr(slow_clients, "HELD_S", 0.5)
    monkeypatch.setattr(slow_clients, "SLOW_S", 10.0)
    monkeypatch.setattr(slow_clients, "_CLIENTS", 2)


@proxied
async def test_the_next_slow_upload_of_a_slow_client_does_not_reach_the_application(proxy: Proxy) -> None:
    assert (await proxy.send(SLOW, b"x"))[0] == 408
    assert proxy.asked == 1
    status, body = await proxy.send(SLOW, b"x")
    assert (status, b"too slow: after earlier ones" in body) == (408, True)
    assert proxy.asked == 1


@proxied
async def test_who_sends_at_once_is_served_even_from_the_address_of_a_slow_client(proxy: Proxy) -> None:
    await proxy.send(SLOW, b"x")
    assert await proxy.send(SLOW, b"ab", b"c", b"") == (200, b"3")
    large = b"x" * (HELD_BYTES // 2)
    assert await proxy.send(SLOW, large, large, large, b"") == (200, str(3 * len(large)).encode())
    assert await proxy.send(OTHER, b"ab", b"") == (200, b"2")


@proxied
async def test_a_whole_upload_goes_with_its_request_and_others_do_not(proxy: Proxy) -> None:
    half = b"x" * (HELD_BYTES // 2)
    for peer in (OTHER, SLOW, SLOW):  # the last one is that of a slow client
        assert await proxy.send(peer, b"ab", b"c", b"") == (200, b"3")
        assert proxy.whole
        assert await proxy.send(peer, half, half, half, b"") == (200, str(3 * len(half)).encode())
        assert not proxy.whole
        await proxy.send(SLOW, b"x")
    assert (await proxy.send(OTHER, b"x")) == (408, b"too slow")
    assert not proxy.whole


@proxied
async def test_uploads_that_are_there_are_whole_however_many_are_held(proxy: Proxy) -> None:
    await proxy.send(SLOW, b"x")
    held = [asyncio.create_task(proxy.send(SLOW, b"x")) for _ in range(HELD_PER_CLIENT)]
    await asyncio.sleep(0)
    assert await proxy.send(SLOW, b"ab", b"") == (200, b"2")
    assert await proxy.send(SLOW, b"ab", b"", after=0.01) == (200, b"2")  # the body in a packet of its own
    assert proxy.whole
    await asyncio.gather(*held)


@proxied
async def test_other_applications_receive_whole_uploads_as_always(proxy: Proxy) -> None:
    proxy.app = HoldSlowUploads(proxy._application)
    assert await proxy.send(OTHER, b"ab", b"c", b"") == (200, b"3")


@proxied
async def test_a_larger_whole_upload_is_received_and_counts_as_whole(proxy: Proxy) -> None:
    assert await proxy.send(OTHER, b"x" * 100_000, b"") == (200, b"100000")
    assert proxy.whole


@proxied
async def test_who_leaves_gives_the_turn_back_and_is_slow(proxy: Proxy) -> None:
    leaving = [asyncio.create_task(proxy.send(SLOW, b"x", LEAVES)) for _ in range(20)]
    await asyncio.gather(*leaving, return_exceptions=True)
    began = asyncio.get_running_loop().time()
    assert (await proxy.send(OTHER, b"x"))[1] == b"too slow"
    assert proxy.asked_at[-1] - began < STALLED_S + 10 * PACE_S
    assert b"earlier ones" in (await proxy.send(SLOW, b"x"))[1]


@proxied
async def test_who_leaves_a_fast_upload_is_not_slow(proxy: Proxy) -> None:
    large = b"x" * (HELD_BYTES // 2)
    with pytest.raises(ClientDisconnect):
        await proxy.send(SLOW, large, large, LEAVES)
    assert (await proxy.send(SLOW, b"x"))[1] == b"too slow"


@proxied
async def test_no_address_takes_all_places_and_a_flood_beyond_them_does_not_reach_the_application(proxy: Proxy) -> None:
    leaving = [asyncio.create_task(proxy.send(SLOW, b"x", LEAVES)) for _ in range(HELD // 2)]
    await asyncio.sleep(0.01)
    assert (await proxy.send(SLOW, b"x"))[0] == 429
    assert (await proxy.send(SLOW, b"ab", b"")) == (200, b"2")
    assert (await proxy.send(OTHER, b"x"))[1] == b"too slow"
    await asyncio.gather(*leaving, return_exceptions=True)


@proxied
async def test_refusals_echo_the_request_id(proxy: Proxy) -> None:
    proxy.app = ProblemsOnly(proxy.app)
    await proxy.send(SLOW, b"x")
    await proxy.send(SLOW, b"x", headers={b"content-length": b"9", b"x-request-id": b"mine"})
    assert dict(proxy.head["headers"])[b"x-request-id"] == b"mine"


@proxied
async def test_a_flood_of_unfinished_uploads_comes_one_by_one(proxy: Proxy) -> None:
    """And once the application has called one of them slow, the others of its address do not come."""
    proxy.refusal = 429
    began = asyncio.get_running_loop().time()
    others = [asyncio.create_task(proxy.send(f"192.0.2.{i}", b"x")) for i in range(10, 18)]
    await asyncio.sleep(0)
    assert await proxy.send(OTHER, b"ab", b"") == (200, b"2")  # whole ones do not wait
    assert proxy.asked == 1
    assert await asyncio.gather(*others) == 8 * [(429, b"too slow")]
    assert all(at - began >= STALLED_S + i * PACE_S - 0.005 for i, at in enumerate(proxy.asked_at[1:]))

    proxy.refusal, proxy.asked = 408, 0
    flood = [asyncio.create_task(proxy.send(SLOW, b"x")) for _ in range(HELD_PER_CLIENT)]
    answers = Counter(b"earlier ones" in body for _, body in await asyncio.gather(*flood))
    assert answers == {False: proxy.asked, True: HELD_PER_CLIENT - proxy.asked}
    assert proxy.asked <= 2 * STALLED_S / PACE_S + 2  # until the first of them is called slow


def test_who_waits_for_a_turn_is_told_soon_that_its_address_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives its turn to the next one."""
    monkeypatch.setattr(slow_clients, "PACE_S", 4.0)

    @proxied
    async def told(proxy: Proxy) -> None:
        began = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(proxy.send(SLOW, b"x") for _ in range(4)))
        assert asyncio.get_running_loop().time() - began < 3.5
        assert Counter(b"earlier ones" in body for _, body in answers) == {False: 1, True: 3}
        assert proxy.asked == 1
        await proxy.send(OTHER, b"x")
        assert proxy.asked_at[-1] - began < 8

    told()


@proxied
async def test_an_upload_of_which_enough_has_come_is_passed_on(proxy: Proxy) -> None:
    """So that the proxy never holds much, and the application's own limits decide."""
    await proxy.send(SLOW, b"x")
    assert await proxy.send(SLOW, b"x" * HELD_BYTES) == (408, b"too slow")
    assert proxy.asked == 2


def test_a_client_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_clients, "SLOW_S", 0.1)

    @proxied
    async def forgiven(proxy: Proxy) -> None:
        await proxy.send(SLOW, b"x")
        await asyncio.sleep(0.2)
        assert (await proxy.send(SLOW, b"x"))[1] == b"too slow"

    forgiven()


@proxied
async def test_an_answer_at_once_and_a_request_without_a_body_make_nobody_slow(proxy: Proxy) -> None:
    assert (await proxy.send(SLOW, b"ab", b""))[0] == 200
    await proxy.send(SLOW, b"x", headers={})
    await proxy.send(SLOW, b"x", headers={b"content-length": b"0"})
    assert (await proxy.send(SLOW, b"x"))[1] == b"too slow"
    assert proxy.asked == 4


@proxied
async def test_a_refusal_for_another_reason_makes_nobody_slow(proxy: Proxy) -> None:
    proxy.refusal = 429
    for _ in range(2):
        assert await proxy.send(SLOW, b"x") == (429, b"too slow")


@proxied
async def test_who_leaves_a_slow_upload_is_slow_and_does_not_reach_the_application_again(proxy: Proxy) -> None:
    with pytest.raises(ClientDisconnect):
        await proxy.send(SLOW, b"x", LEAVES)
    assert proxy.asked == 1
    await proxy.send(SLOW, b"x", LEAVES)
    assert proxy.asked == 1


@proxied
async def test_a_body_is_passed_on_in_one_piece_even_if_it_is_empty(proxy: Proxy) -> None:
    await proxy.send(SLOW, b"x")
    assert await proxy.send(SLOW, *[b"y"] * 500, b"") == (200, b"500")
    assert await proxy.send(SLOW, b"") == (200, b"0")


@proxied
async def test_few_uploads_are_held_at_a_time(proxy: Proxy) -> None:
    await proxy.send(SLOW, b"x")
    began = asyncio.get_running_loop().time()
    held = [asyncio.create_task(proxy.send(SLOW, b"x")) for _ in range(HELD_PER_CLIENT)]
    await asyncio.sleep(0)
    assert await proxy.send(SLOW, b"ab", b"") == (200, b"2")
    assert asyncio.get_running_loop().time() - began < 0.3  # it does not wait for those that are held
    asked = proxy.asked
    assert b"earlier ones" in (await proxy.send(SLOW, b"x"))[1]  # nor do further ones reach the application
    assert proxy.asked == asked
    assert {status for status, _ in await asyncio.gather(*held)} == {408}
    assert await proxy.send(SLOW, b"ab", b"") == (200, b"2")  # their places are free again


@proxied
async def test_only_so_many_clients_are_remembered(proxy: Proxy) -> None:
    for peer in (SLOW, OTHER, "192.0.2.3"):
        await proxy.send(peer, b"x")
    assert b"earlier ones" in (await proxy.send(OTHER, b"x"))[1]
    assert (await proxy.send(SLOW, b"x"))[1] == b"too slow"
