"""Models whose radii are not published: what requests may ask for, and where their certificates are kept."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from macer_serve.atomic_writes import atomic_file
from macer_serve.errors import OutputError, ParameterError, ServingError
from macer_serve.issuing import CLAIM, Issuer
from macer_serve.serving.query import PredictQuery
from macer_serve.serving.settings import ModelSettings
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.short_claim import ShortClaim

log = logging.getLogger("ray.serve")

# Whoever may vary these sees at which value the answer changes, and so the radius.
_TELLING = ("n", "alpha", "tolerance", "timeout_s")


def asked_radius(settings: ModelSettings, query: PredictQuery) -> float | None:
    """Returns the radius that an answer decides on; None if the answer is a bucket, or the radius itself.

    Raises `ParameterError` for requests whose answers would show more than the model reveals.
    """
    if settings.reveal == "radius":
        return None
    grid = ", ".join(f"{r:g}" for r in settings.bucket_grid)
    if query.mode == "predict":
        raise ParameterError(f"this model reveals a {settings.reveal} alone: mode=predict is not offered")
    if named := [name for name in _TELLING if getattr(query, name) is not None]:
        raise ParameterError(
            f"this model reveals a {settings.reveal} alone: {', '.join(named)} would show more, and must be left out"
        )
    if query.radius is not None and query.radius not in settings.bucket_grid:
        raise ParameterError(f"this model answers for these radii only: {grid}; {query.radius:g} is none of them")
    if settings.reveal == "bucket":
        return None
    if query.radius is not None:
        return query.radius
    return settings.radius if settings.radius in settings.bucket_grid else settings.bucket_grid[0]


def plan_radius(settings: ModelSettings, query: PredictQuery, asked: float | None) -> float | None:
    """Returns the radius of the request's plan. A fixed plan has none: its votes decide on every radius."""
    return None if asked is not None and settings.plan().kind == "fixed" else query.radius or asked


def require_writable(folder: str | None) -> None:
    """Make the folder of withheld certificates. Raises `ParameterError` if nothing can be written there."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"withheld_dir {folder} cannot be made: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ParameterError(f"withheld_dir {folder} cannot be written: the server needs the right to write there")


def withhold(
    certificate: Certificate, jws: str, settings: ModelSettings, asked: float | None, folder: str, issuer: Issuer
) -> tuple[ShortClaim, str]:
    """Returns the short claim with its signed form, after the certificate is kept as `DIGEST.jws` in the folder.

    Raises `ServingError` if it cannot be kept: a claim whose evidence is lost could never be proved.
    """
    claim = ShortClaim.of(certificate, jws, reveal=settings.reveal, grid=settings.bucket_grid, asked=asked)
    try:
        with atomic_file(Path(folder) / f"{claim.withheld.removeprefix('sha256:')}.jws") as file:
            file.write(jws.encode())
    except OutputError as error:
        log.error("a certificate cannot be kept: %s", error)  # the client need not know the server's folders
        raise ServingError("the certificate behind this answer could not be kept; try again later") from None
    return claim, issuer.sign(claim.canonical(), CLAIM)
