"""The proxy's middlewares around applications that answer as Serve does: plain text, or nothing at all."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from macer_serve.serving.proxy import ProblemsOnly, RemoveRayHeaders


def ask(app: ASGIApp, headers: dict[str, str] | None = None) -> httpx.Response:
    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/", headers=headers)

    return asyncio.run(asked())


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve does if the ingress is lost."""


async def raises(scope: Scope, receive: Receive, send: Send) -> None:
    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


@pytest.mark.parametrize(
    ("app", "status", "says"),
    [
        (PlainTextResponse("Path '/' not found. Ping ...", 404), 404, "no application at this path"),
        (PlainTextResponse("Request 1 timed out after 1s.", 408), 408, "within the time"),
        (PlainTextResponse("busy", 429), 429, "try again"),
        (PlainTextResponse("Internal Server Error", 500), 500, "can be sent again"),
        (PlainTextResponse("unavailable", 503), 503, "try again"),
        (PlainTextResponse("Disallowed", 400), 400, "Disallowed"),
        (StreamingResponse(iter(["in ", "parts"]), 451), 451, "in parts"),
        (nothing, 500, "can be sent again"),
        (raises, 500, "can be sent again"),
    ],
)
def test_an_error_that_is_no_problem_document_becomes_one(app: ASGIApp, status: int, says: str) -> None:
    answer = ask(ProblemsOnly(app))
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert says in answer.json()["detail"]
    assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_what_serve_says_about_the_time_to_come_back_is_kept() -> None:
    assert ask(ProblemsOnly(PlainTextResponse("", 503, {"retry-after": "7"}))).headers["retry-after"] == "7"


def test_other_answers_pass_unchanged() -> None:
    answer = ask(ProblemsOnly(PlainTextResponse("success")))
    assert (answer.status_code, answer.text) == (200, "success")
    problem = PlainTextResponse("{}", 422, media_type="application/problem+json")
    assert ask(ProblemsOnly(problem)).text == "{}"


def test_an_answer_that_has_begun_is_not_followed_by_another() -> None:
    async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        ask(ProblemsOnly(breaks_off))


def test_headers_for_ray_do_not_reach_it() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await PlainTextResponse("")(scope, receive, send)

    ray = ["x-request-timeout-seconds", "X-Request-Disconnect-Disabled", "x_session_id", "Serve-Multiplexed-Model-Id"]
    ask(
        RemoveRayHeaders(app), dict.fromkeys([*ray, "x-serve-router-a", "x-other"], "1") | {"x-request-id": "two words"}
    )
    names = {name for name, _ in seen}
    assert b"x-other" in names
    assert not {name for name in names if b"request" in name or b"session" in name or b"serve" in name}
