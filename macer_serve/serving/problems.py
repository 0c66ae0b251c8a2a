"""Errors as RFC 9457 problem documents, `application/problem+json`."""

from __future__ import annotations

import http
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from macer_serve.errors import (
    EngineError,
    MacerError,
    ParameterError,
    ServingError,
    TooLargeError,
    UnsupportedTypeError,
    UploadError,
)
from macer_serve.serving.whole_uploads import came_whole

log = logging.getLogger("ray.serve")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1.0
# By this header the ingress tells the proxy in how many seconds there will be time. Clients do not see it.
TIME_IN = b"x-macer-time-in"


class BusyError(ServingError):
    """The server cannot answer now. It can be expected to do so after `retry_after_s` seconds."""

    def __init__(self, detail: str, retry_after_s: float = RETRY_AFTER_S) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class OverloadedError(BusyError):
    title = "Too many requests"


class UnavailableError(BusyError):
    title = "No voter is available"


class DrainingError(BusyError):
    title = "Server is shutting down"


class SlowUploadError(ServingError):
    title = "Upload takes too long"


class ClientLeftError(ServingError):
    title = "Client left"


class SeveralImagesError(UploadError):
    title = "More than one image"


class UnknownModelError(MacerError):
    title = "Unknown model"


# The HTTP status of each kind of error: the nearest ancestor that is listed decides.
STATUSES: dict[type[MacerError], int] = {
    MacerError: 500,
    UploadError: 400,
    UnknownModelError: 404,
    SlowUploadError: 408,
    TooLargeError: 413,
    UnsupportedTypeError: 415,
    ParameterError: 422,
    SeveralImagesError: 422,
    OverloadedError: 429,
    ClientLeftError: 499,  # nobody reads this answer; access logs call it so
    EngineError: 503,
    ServingError: 503,
}


def status_of(error: MacerError) -> int:
    """Returns the HTTP status with which an error is answered."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def document(status: int, title: str, detail: str) -> dict[str, Any]:
    """Returns the members of RFC 9457."""
    return {"type": "about:blank", "title": title, "status": status, "detail": detail}


def document_for(error: MacerError) -> dict[str, Any]:
    """Returns the document of an error that a user can cause or repair."""
    return document(status_of(error), error.title, str(error))


def unforeseen(where: str) -> dict[str, Any]:
    """Returns the document of a defect and logs its traceback. Must be called while the exception is handled."""
    log.exception("unforeseen error on %s", where)
    return document(500, "Internal error", "This is a defect of the server; its log has the details.")


def problem(
    status: int,
    title: str,
    detail: str,
    headers: Mapping[str, str] | None = None,
    retry_after_s: float = RETRY_AFTER_S,
) -> JSONResponse:
    """Returns the response with the problem document; 429 and 503 say when to come back, in whole seconds."""
    later = {"Retry-After": str(math.ceil(retry_after_s))} if status in (429, 503) else {}
    headers = {**(headers or {}), **later}
    return JSONResponse(document(status, title, detail), status_code=status, headers=headers, media_type=MEDIA_TYPE)


def problem_of(error: MacerError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Returns the response with the problem document of an error."""
    retry_after_s = getattr(error, "retry_after_s", RETRY_AFTER_S)
    return problem(status_of(error), error.title, str(error), headers, retry_after_s)


def time_in(scope: Scope, seconds: float) -> dict[str, str]:
    """Returns the header by which the proxy may repeat a refusal; none if no proxy would remove it.

    The refusal must hold for every request like this one, until a request that is in work has ended.
    """
    return {TIME_IN.decode(): f"{seconds:.3f}"} if came_whole(scope) else {}


def _fault(error: Mapping[str, Any]) -> str:
    """Returns one of pydantic's errors as `parameter: what is wrong`."""
    where, words = ".".join(map(str, error["loc"][1:])), error["msg"].removeprefix("Value error, ")
    return f"{where}: {words}" if where else words


def install(app: FastAPI) -> None:
    """Answer every error of the app by a problem document."""

    @app.exception_handler(MacerError)
    async def ours(request: Request, error: MacerError) -> JSONResponse:
        if isinstance(error, OverloadedError) and getattr(request.state, "only_ingress", False):
            return problem_of(error, time_in(request.scope, error.retry_after_s))
        return problem_of(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, ParameterError.title, "; ".join(map(_fault, error.errors())))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        title = http.HTTPStatus(error.status_code).phrase
        return problem(error.status_code, title, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(unforeseen(f"{request.method} {request.url.path}"), 500, media_type=MEDIA_TYPE)
