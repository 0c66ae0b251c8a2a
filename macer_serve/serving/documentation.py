"""The web page, the interactive documentation without foreign servers, and what OpenAPI cannot read off the routes."""

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi.openapi.docs import get_swagger_ui_html

from macer_serve.serving import problems
from macer_serve.serving.schemas import Problem
from macer_serve.serving.uploads import BYTES, JSON, MULTIPART

Html = tuple[str, dict[str, str]]


def _policed(html: str, scripts: str) -> Html:
    """Returns a page whose headers allow its inline scripts and the scripts in `scripts` only."""
    digests = [hashlib.sha256(text.encode()).digest() for text in re.findall(r"<script>(.*?)</script>", html, re.S)]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return html, {
        "Content-Security-Policy": f"default-src 'none'; script-src {allowed} {scripts}; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
    }


def _swagger() -> str:
    """Returns FastAPI's page of Swagger UI with addresses of this server; relative, for it may lie under a prefix."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="macer-serve",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"defaultModelsExpandDepth": 0},
    )
    return bytes(page.body).decode()


PAGE = _policed(Path(__file__).with_name("page.html").read_text(encoding="utf-8"), "")
DOCS = _policed(_swagger(), "'self'")
ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


def asset(name: str) -> bytes:
    """Returns a file of Swagger UI, which a package brings."""
    return files("fastapi_swagger.resources").joinpath(name).read_bytes()


_FILE = {"type": "string", "format": "binary"}
_PIXEL = (  # the smallest PNG, one white pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {"schema": {"type": "object", "required": ["file"], "properties": {"file": _FILE}}},
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {"image": {"type": "string", "format": "byte", "description": "The file in base64."}},
                },
                "example": {"image": _PIXEL},
            },
            **{kind: {"schema": _FILE} for kind in ("image/png", "image/jpeg", "image/webp", BYTES)},
        },
    }
}

_DETAILS = {
    400: ("Image cannot be decoded", "the file is not an image"),
    404: ("Unknown model", "there is no model 'x'; choose one of: cifar10"),
    408: ("Upload takes too long", "the upload was not complete after 60 s"),
    413: ("Image is too large", "the upload has more than 10,485,760 bytes; send a smaller image"),
    415: ("Image type is not supported", "GIF is not accepted: send PNG, JPEG or WebP"),
    422: ("Parameter outside its allowed range", "n must not exceed this model's 100000, not 200000"),
    429: ("Too many requests", "64 requests are in work already; try again shortly"),
    503: ("No voter is available", "no voter answers; try again shortly"),
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": title,
        "content": {
            problems.MEDIA_TYPE: {
                "schema": Problem.model_json_schema(),
                "example": problems.document(status, title, detail),
            }
        },
    }
    for status, (title, detail) in _DETAILS.items()
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    200: {
        "description": "The answer, or with stream=true its events",
        "content": {
            "text/event-stream": {"schema": {"type": "string"}, "example": 'event: result\ndata: {"label": ...}'}
        },
    },
}
