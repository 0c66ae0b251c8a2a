"""Errors as RFC 9457 problem documents, `application/problem+json`."""

from __future__ import annotations

import http
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from macer_serve.errors import MacerError

log = logging.getLogger("ray.serve")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1


class OverloadedError(MacerError):
    status, exit_code, title = 429, 9, "Too many requests"


class UnavailableError(MacerError):
    status, exit_code, title = 503, 9, "No voter is available"


class SlowUploadError(MacerError):
    status, exit_code, title = 408, 9, "Upload takes too long"


class ClientLeftError(MacerError):
    """Nobody reads this answer; 499 is what access logs call it."""

    status, exit_code, title = 499, 9, "Client left"


class UnknownModelError(MacerError):
    status, exit_code, title = 404, 2, "Unknown model"


def document(status: int, title: str, detail: str) -> dict[str, Any]:
    """RFC 9457's members."""
    return {"type": "about:blank", "title": title, "status": status, "detail": detail}


def of(error: MacerError) -> dict[str, Any]:
    """The document of an error that a user can cause or repair."""
    return document(error.status, error.title, str(error))


def unforeseen(where: str) -> dict[str, Any]:
    """The document of a defect, whose traceback goes to the log: to be called where it is caught."""
    log.exception("unforeseen error on %s", where)
    return document(500, "Internal error", "This is a defect of the server; its log has the details.")


def problem(status: int, title: str, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The problem document; 429 and 503 say when to come back."""
    headers = {**(headers or {}), **({"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {})}
    return JSONResponse(document(status, title, detail), status_code=status, headers=headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of the app by a problem document."""

    @app.exception_handler(MacerError)
    async def ours(request: Request, error: MacerError) -> JSONResponse:
        return problem(error.status, error.title, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        details = [f"{'.'.join(str(p) for p in e['loc'][1:])}: {e['msg']}" for e in error.errors()]
        return problem(422, "Parameter outside its allowed range", "; ".join(details))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        title = http.HTTPStatus(error.status_code).phrase
        return problem(error.status_code, title, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(unforeseen(f"{request.method} {request.url.path}"), 500, media_type=MEDIA_TYPE)
