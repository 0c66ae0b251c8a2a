"""Bodies that came whole before the application was asked: the proxy says so, and puts small ones into the scope.

So the ingress sees that the client was not slow, however late the ingress itself is; and it need not wait for a small
body to be fetched from the proxy's process. Clients cannot set what a scope holds. Applications that do not look there
receive the body as always.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_WHOLE, _BODY = "macer_serve.whole", "macer_serve.body"
_SMALL = 64 * 2**10  # bytes; Ray keeps arguments of 100 KiB and more in a store of their own


def with_whole(scope: Scope, body: bytes) -> Scope:
    """Returns the scope of a request whose body came whole."""
    return {**scope, _WHOLE: True, **({_BODY: body} if len(body) <= _SMALL else {})}


def came_whole(scope: Scope) -> bool:
    """Returns whether the request's body came whole before the application was asked."""
    return _WHOLE in scope


class ReceiveBodyFromScope:
    """Gives the application the body that lies in the scope, and does not give it the same body a second time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _BODY not in scope:
            await self._app(scope, receive, send)
            return
        body: bytes | None = scope[_BODY]

        async def received() -> Message:
            nonlocal body
            if body is not None:
                whole, body = body, None
                return {"type": "http.request", "body": whole, "more_body": False}
            while (message := await receive())["type"] == "http.request":
                pass  # the same body
            return message

        await self._app(scope, received, send)
