"""Bodies that came whole before the application was asked: the proxy puts them into the request's scope.

The ingress need not fetch them, which would take a call from its process to the proxy's. And it sees that the client
was not slow, however late the ingress itself is. Clients cannot set what a scope holds.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_BODY = "macer_serve.body"


def with_body(scope: Scope, body: bytes) -> Scope:
    """Returns the scope of a request together with its whole body."""
    return {**scope, _BODY: body}


def came_whole(scope: Scope) -> bool:
    """Returns whether the request's body came with it."""
    return _BODY in scope


class ReceiveBodyFromScope:
    """Middleware of the application, to which a body in the scope is the one that it receives."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: bytes | None = scope.get(_BODY)

        async def received() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        await self._app(scope, received, send)
