"""The documents that the HTTP API answers with."""

from __future__ import annotations

import datetime
from typing import Any

from pydantic import BaseModel, Field

from macer_serve.smoothing.certificate import Certificate, ranked


class ClassVotes(BaseModel):
    label: str
    class_id: int
    votes: int = Field(description="Estimation votes.")


class Timing(BaseModel):
    queue: float = Field(description="Milliseconds that the complete upload waited to be decoded.")
    decode: float = Field(description="Milliseconds from upload to model input.")
    certify: float = Field(description="Milliseconds from model input to certificate.")


class Answer(BaseModel):
    """A class with its certified radius, or an abstention, and the certificate that proves it."""

    label: str | None
    class_id: int | None
    abstained: bool
    radius: float = Field(description="Certified L2 radius at the model input, pixel values in [0, 1].")
    upload_radius: float = Field(description="Certified L2 radius at the decoded RGB pixels of the upload.")
    top: list[ClassVotes] = Field(description="Up to five classes by estimation votes.")
    reason: str | None = Field(description="Why the answer is an abstention.")
    stopped: str | None = Field(description="What ended the run: radius, tolerance, futility, n, cap or deadline.")
    certificate: dict[str, Any] = Field(description="Self-contained; identical for identical requests.")
    certificate_jws: str | None = Field(
        description="The certificate as a JWS (RS256), signed by the key that `/.well-known/jwks.json` gives."
    )
    issued_at: str
    timing_ms: Timing


class Progress(BaseModel):
    """What is proved so far: a certificate that stands, whatever comes after it."""

    label: str | None
    class_id: int | None
    abstained: bool
    n: int = Field(description="Estimation votes that it rests on.")
    radius: float
    upload_radius: float
    certificate: dict[str, Any]


class ModelDescription(BaseModel):
    name: str
    digest: str
    architecture: str
    classes: list[str]
    sigma: float
    input_shape: list[int] = Field(description="Channels, height, width.")
    noise: str
    plan: dict[str, Any]
    cap: int = Field(description="Votes unless a request names n.")
    default: bool


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str


def progress(certificate: Certificate) -> Progress:
    """The event that carries the certificate."""
    return Progress(
        label=certificate.label,
        class_id=certificate.class_id,
        abstained=certificate.abstained,
        n=certificate.n,
        radius=certificate.radius,
        upload_radius=certificate.upload_radius,
        certificate=certificate.to_json(),
    )


def answer(certificate: Certificate, jws: str | None, classes: tuple[str, ...], timing: Timing) -> Answer:
    """Returns the answer that carries the certificate and its signed form."""
    return Answer(
        label=certificate.label,
        class_id=certificate.class_id,
        abstained=certificate.abstained,
        radius=certificate.radius,
        upload_radius=certificate.upload_radius,
        top=[ClassVotes(label=label, class_id=c, votes=n) for label, c, n in ranked(certificate, classes)],
        reason=certificate.reason,
        stopped=certificate.stopped,
        certificate=certificate.to_json(),
        certificate_jws=jws,
        issued_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        timing_ms=timing,
    )
