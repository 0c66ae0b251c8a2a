"""The HTTP connections of Serve's proxy: heads of requests come in time and are small, and refusals are problems."""

from __future__ import annotations

import asyncio
import http
import json
import sys
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from macer_serve.serving.problems import MEDIA_TYPE, document

HEAD_S = 5.0  # until a request line and its headers have come
HEAD_BYTES = 64 * 2**10  # of a request line and its headers
URL_BYTES = 16 * 2**10
FIELDS = 100  # header lines
WRITE_S = 60.0  # that a client may read nothing of its answer
_LINGER_S = 1.0  # that a refused client has to read why
_LINGER_BYTES = 4 * 2**20

_TOO_LARGE = f"the request line and the headers of a request have at most {HEAD_BYTES:,} bytes"
_TITLES = {400: "Bad request", 408: "Request takes too long", 414: "Address is too long", 431: "Headers are too large"}


class _RefusedError(Exception):
    """A request whose head is refused; raised in the parser's callbacks, which stops the parser."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits for the heads of requests and for readers that do not read.

    uvicorn bounds neither the time nor the size of a head, and stops its keep-alive timer when the first byte of the
    next request comes. Its own refusals are plain text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._head_size = 0  # of what the parser has reported of this head
        self._fed = 0  # bytes since the head began
        self._in_head = False
        self._running: RequestResponseCycle | None = None
        self._lingering: int | None = None  # bytes that are read on after a refusal

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._reads_again()
        if self._running is not None:  # uvicorn tells the last request of a pipeline only
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingering is not None:
            self._lingering -= len(data)
            if self._lingering < 0:
                self.transport.abort()
            return
        head_continues = self._in_head
        super().data_received(data)
        if self._lingering is not None or self.transport.is_closing():
            return
        if self._in_head and head_continues:
            self._fed += len(data)
            if self._fed > HEAD_BYTES:
                self._refuse(431, _TOO_LARGE)
        if self._in_head or self._idle():
            self._expect_head()

    def eof_received(self) -> None:
        if self._lingering is not None:
            self.transport.close()

    def _idle(self) -> bool:
        """Returns whether no request is answered; what comes then is a head, or a body that nobody wants."""
        return self.cycle is None or self.cycle.response_complete

    # What the parser reports

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_size, self._fed = True, 0, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > URL_BYTES:
            raise _RefusedError(414, f"the address of a request has at most {URL_BYTES:,} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_size += len(name) + len(value) + len(": \r\n")
        if len(self.headers) > FIELDS:
            raise _RefusedError(431, f"a request has at most {FIELDS} header lines")
        if self._head_size > HEAD_BYTES:
            raise _RefusedError(431, _TOO_LARGE)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_came()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # Timers

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._head_is_late)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if not self._idle():  # the head of a pipelined request; the answer before it may take its time
            self._expect_head()
        elif self._in_head:
            self._refuse(408, f"the headers were not complete after {HEAD_S:g} s")
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reads_again()

    def _reads_again(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # Refusals

    def send_400_response(self, msg: str) -> None:
        """Answers what the parser has refused; called by uvicorn while the parser's error is handled."""
        error = sys.exc_info()[1]
        while error is not None and not isinstance(error, _RefusedError):
            error = error.__cause__ or error.__context__
        if error is None:
            self._refuse(400, "the request is not valid HTTP/1.1")
        else:
            self._refuse(error.status, str(error))

    def _refuse(self, status: int, detail: str) -> None:
        """Answers with a problem document and closes the connection."""
        self._head_came()
        if not self._idle():
            if self.pipeline or self.cycle.response_started or not self.cycle.more_body:
                self.transport.close()  # what is written now would be taken for the answer to an earlier request
                return
            self.cycle.disconnected = True  # its body is refused
            self.cycle.message_event.set()
        body = json.dumps(document(status, _TITLES[status], detail)).encode()
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # A connection that is closed while the client sends on is reset, and the client would not see the answer.
        self._lingering = _LINGER_BYTES
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.abort)
