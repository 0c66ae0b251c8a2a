"""What runs in Serve's HTTP proxy: headers that only Ray reads are removed, and every error is a problem document."""

from __future__ import annotations

import functools
import http
import json
import logging
import math
import re
import uuid
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from macer_serve.serving.problems import MEDIA_TYPE, RETRY_AFTER_S, document
from macer_serve.serving.repeated_refusals import RepeatRefusals
from macer_serve.serving.slow_clients import HoldSlowUploads

log = logging.getLogger("ray.serve")

REQUEST_ID = b"x-request-id"
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
# By them a client could lift Serve's time-out, forbid that its work is cancelled, or choose the replica.
_RAYS_HEADERS = (b"x_request_timeout_seconds", b"x_request_disconnect_disabled", b"serve_multiplexed_model_id")
_RAYS_PREFIX = b"x_serve_"
_HELD_BYTES = 64 * 2**10  # of an error's body that is not a problem document

_DETAILS = {
    404: "There is no application at this path; it may still be starting.",
    408: "The server did not answer within the time that its operator allows a request.",
    429: "Too many requests wait for the application; try again shortly.",
    500: "The server lost this request, for example because its process has ended. It can be sent again.",
    503: "The application cannot be reached; try again shortly.",
}


class RemoveRayHeaders:
    """Removes the headers by which clients instruct Ray, and request ids that could not be echoed."""

    def __init__(self, app: ASGIApp) -> None:
        from ray.serve._private.constants import SERVE_SESSION_ID

        self._app = app
        self._removed = {*_RAYS_HEADERS, SERVE_SESSION_ID.lower().replace("-", "_").encode()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "headers": self._kept(scope["headers"])}
        await self._app(scope, receive, send)

    def _kept(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        kept, named = [], False
        for name, value in headers:
            if name == REQUEST_ID:
                if named or not _REQUEST_ID.fullmatch(value):
                    continue  # Ray makes one
                named = True
            folded = name.lower().replace(b"-", b"_")
            if folded not in self._removed and not folded.startswith(_RAYS_PREFIX):
                kept.append((name, value))
        return kept


class ProblemsOnly:
    """Answers with a problem document where the application answers with another error, or with nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, next((value for name, value in scope["headers"] if name == REQUEST_ID), None))
        try:
            await self._app(scope, receive, answer)
        except Exception:
            if answer.begun:
                raise
            log.exception("unforeseen error on %s %s", scope["method"], scope["path"])
        if not answer.begun:
            await answer.fail(500, [])


class _Answer:
    """The sending side of one request: it holds back errors that are not problem documents, and errors name a request.

    `request_id` is the client's. One is made if neither the client nor the application has named the request.
    """

    def __init__(self, send: Send, request_id: bytes | None) -> None:
        self._send, self._request_id = send, request_id
        self._error: Message | None = None  # the start of an error that is not a problem document
        self._body = b""
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_foreign(message):
            self._error = message
        elif self._error is None:
            self.begun = True
            if message["type"] == "http.response.start" and message["status"] >= 400:
                message = {**message, "headers": self._named(message.get("headers", []))}
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")[: _HELD_BYTES - len(self._body)]
            if not message.get("more_body", False):
                await self.fail(self._error["status"], self._error.get("headers", []))

    async def fail(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends the problem document of a status, with those of the headers that are not about the body."""
        self.begun = True
        phrase = http.HTTPStatus(status).phrase
        detail = _DETAILS.get(status) or self._body.decode("utf-8", "replace").strip() or phrase
        body = json.dumps(document(status, phrase, detail)).encode()
        kept = [(name, value) for name, value in headers if not name.lower().startswith(b"content-")]
        if status in (429, 503) and b"retry-after" not in {name.lower() for name, _ in kept}:
            kept.append((b"retry-after", str(math.ceil(RETRY_AFTER_S)).encode()))
        kept = self._named(kept)
        kept += [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": kept})
        await self._send({"type": "http.response.body", "body": body})

    def _named(self, headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Returns the headers with a request id; the application may have had no time to add it."""
        if REQUEST_ID in {name.lower() for name, _ in headers}:
            return list(headers)
        return [*headers, (REQUEST_ID, self._request_id or str(uuid.uuid4()).encode())]


def _is_foreign(start: Message) -> bool:
    """Returns whether a response begins that is an error, but no problem document."""
    kinds = [value for name, value in start.get("headers", []) if name.lower() == b"content-type"]
    return start["status"] >= 400 and not any(kind.startswith(MEDIA_TYPE.encode()) for kind in kinds)


def middlewares() -> list[Middleware]:
    """Returns the proxy's middlewares; each wraps those before it."""
    kinds = (RepeatRefusals, HoldSlowUploads, ProblemsOnly, RemoveRayHeaders)
    return [Middleware(kind) for kind in kinds]


def limit_connections() -> None:
    """Makes Serve's proxy take its connections with the limits of `connection.Connection`, and no web sockets."""
    import uvicorn
    from ray.serve._private import http_util as module

    from macer_serve.serving.connection import Connection

    # Only what that module calls can be replaced: Ray sends the proxy's own code to its process by value.
    http_util: Any = module
    config = functools.partial(uvicorn.Config, http=Connection, ws="none")
    http_util.uvicorn = SimpleNamespace(Config=config, Server=uvicorn.Server)
