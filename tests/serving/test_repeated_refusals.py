"""The proxy repeats a refusal for want of time, so that clients who come back early take no time from the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from macer_serve.serving import repeated_refusals
from macer_serve.serving.problems import TIME_IN, time_in
from macer_serve.serving.proxy import ProblemsOnly
from macer_serve.serving.repeated_refusals import RepeatRefusals
from macer_serve.serving.whole_uploads import with_whole

MEDIA_TYPE = "application/problem+json"
LATER = {"retry-after": "4", "access-control-allow-origin": "https://a.example", "x-request-id": "of the first"}


class Proxy:
    """The middleware around an application that refuses for `seconds`, or answers `status`, and counts requests."""

    def __init__(self) -> None:
        self.status, self.seconds, self.asked = 429, 3.2, 0
        self.may_be_repeated, self.hangs, self.late = True, False, False
        self.app: ASGIApp = RepeatRefusals(self._application)

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        if self.hangs:
            await asyncio.sleep(60)
        headers = {**LATER, **(time_in(scope, self.seconds) if self.may_be_repeated else {})}
        answer = JSONResponse({"asked": self.asked}, self.status, headers, MEDIA_TYPE)
        if self.late:
            await asyncio.sleep(0.1)
        await answer(scope, receive, send)

    async def send(
        self, query: bytes = b"", path: str = "/predict", whole: bool = True, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body of the answer to an upload."""
        scope: Scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "query_string": query}
        headers = {"content-length": "1", **headers}
        scope["headers"] = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        answer: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def send(message: Any) -> None:
            answer.append(message)

        await self.app(with_whole(scope, b"x") if whole else scope, receive, send)
        described = {name.decode(): value.decode() for name, value in answer[0]["headers"]}
        assert TIME_IN.decode() not in described
        return answer[0]["status"], described, b"".join(message.get("body", b"") for message in answer[1:])


def proxied(test: Callable[[Proxy], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test(Proxy()))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@proxied
async def test_a_refusal_is_repeated_and_says_what_is_left_of_the_time(proxy: Proxy) -> None:
    proxy.seconds = 4.0
    first = await proxy.send(b"n=10")
    assert (first[0], first[1]["retry-after"], proxy.asked) == (429, "4", 1)
    await asyncio.sleep(1.2)
    status, headers, body = await proxy.send(b"n=10")
    assert (status, body, proxy.asked) == (429, first[2], 1)
    assert headers["retry-after"] == "3"
    assert headers["content-type"] == MEDIA_TYPE
    assert headers["access-control-allow-origin"] == "https://a.example"


@proxied
async def test_the_application_is_asked_again_at_half_of_the_time(proxy: Proxy) -> None:
    proxy.seconds = 0.6
    await proxy.send()
    assert (await proxy.send())[1]["retry-after"] == "1"
    assert proxy.asked == 1
    await asyncio.sleep(0.35)
    await proxy.send()
    assert proxy.asked == 2


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("status", [200, 400, 503])
def test_the_application_is_asked_again_when_another_request_has_ended(status: int, whole: bool) -> None:
    """So that an idle server refuses nobody, and what a client gives up by leaving is there for others."""

    @proxied
    async def asked_again(proxy: Proxy) -> None:
        await proxy.send(b"n=10")
        proxy.status, proxy.may_be_repeated = status, False
        await proxy.send(b"n=1", whole=whole)
        assert (await proxy.send(b"n=10"))[0] == status
        assert proxy.asked == 3

    asked_again()


@proxied
async def test_a_refusal_that_comes_after_the_end_of_what_it_is_about_is_not_repeated(proxy: Proxy) -> None:
    proxy.late = True
    refused = asyncio.create_task(proxy.send(b"n=10"))
    await asyncio.sleep(0.01)  # the application has refused, and its answer is on its way
    proxy.late, proxy.status, proxy.may_be_repeated = False, 200, False
    await proxy.send(b"n=1")
    assert (await refused)[0] == 429
    assert (await proxy.send(b"n=10"))[0] == 200


@proxied
async def test_the_application_is_asked_again_when_a_client_has_left(proxy: Proxy) -> None:
    await proxy.send(b"n=10")
    proxy.hangs = True
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await proxy.send(b"n=1")
    proxy.hangs = False
    await proxy.send(b"n=10")
    assert proxy.asked == 3


def test_the_application_is_asked_again_soon_however_long_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_refusals, "REPEATED_S", 0.5)

    @proxied
    async def asked_again(proxy: Proxy) -> None:
        proxy.seconds = 60.0
        await proxy.send()
        await proxy.send()
        assert proxy.asked == 1
        await asyncio.sleep(0.6)
        await proxy.send()
        assert proxy.asked == 2

    asked_again()


@proxied
async def test_other_requests_are_asked_about(proxy: Proxy) -> None:
    await proxy.send(b"n=10", host="a.example")
    others: list[dict[str, Any]] = [
        {"query": b"n=11"},
        {"query": b"n=10", "path": "/v1/predict"},
        {"query": b"n=10", "host": "b.example"},
        {"query": b"n=10", "host": "a.example", "origin": "https://b.example"},
        {"query": b"n=10", "host": "a.example", "sec_fetch_site": "cross-site"},
        {"query": b"n=10", "host": "a.example", "whole": False},  # it may be too large, or too slow
    ]
    for i, other in enumerate(others):
        await proxy.send(**other)
        assert proxy.asked == 2 + i, other
    await proxy.send(b"n=10", host="a.example", user_agent="another")
    assert proxy.asked == 1 + len(others)


@proxied
async def test_what_the_application_does_not_mark_is_not_repeated(proxy: Proxy) -> None:
    """Such as a refusal that concerns one client, or that of another application behind the same proxy."""
    proxy.may_be_repeated = False
    for asked in (1, 2):
        await proxy.send()
        assert proxy.asked == asked


@proxied
async def test_a_repeated_refusal_names_the_request_that_it_answers(proxy: Proxy) -> None:
    proxy.app = ProblemsOnly(proxy.app)
    assert (await proxy.send())[1]["x-request-id"] == "of the first"
    made = (await proxy.send())[1]["x-request-id"]
    assert made != "of the first"
    assert (await proxy.send())[1]["x-request-id"] != made
    assert (await proxy.send(x_request_id="mine"))[1]["x-request-id"] == "mine"
    assert proxy.asked == 1


def test_only_so_many_refusals_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_refusals, "_KINDS", 2)

    @proxied
    async def forgotten(proxy: Proxy) -> None:
        for query in (b"n=1", b"n=2", b"n=3"):
            await proxy.send(query)
        await proxy.send(b"n=3")
        assert proxy.asked == 3
        await proxy.send(b"n=1")
        assert proxy.asked == 4

    forgotten()
