"""The documents that the HTTP API answers with."""

from __future__ import annotations

import datetime
from typing import Any

from pydantic import BaseModel, Field

from macer_serve.smoothing.certificate import Certificate, ranked
from macer_serve.smoothing.short_claim import ShortClaim


class ClassVotes(BaseModel):
    label: str
    class_id: int
    votes: int = Field(description="Estimation votes.")


class Timing(BaseModel):
    queue: float = Field(description="Milliseconds that the complete upload waited to be decoded.")
    decode: float = Field(description="Milliseconds from upload to model input.")
    certify: float = Field(description="Milliseconds from model input to certificate.")


class Answer(BaseModel):
    """A class with its certified radius, or an abstention, and the certificate that proves it.

    A coarse answer is an abstention that names a certified group of classes instead.
    """

    label: str | None
    class_id: int | None
    abstained: bool = Field(description="No class is certified; label and class_id are null, the radii 0.")
    radius: float = Field(description="Certified L2 radius at the model input, pixel values in [0, 1].")
    upload_radius: float = Field(description="Certified L2 radius at the decoded RGB pixels of the upload.")
    level: int = Field(description="0: a class was to be certified. Above: a group of this level.")
    group: str | None = Field(description="The certified group of classes of a coarse answer. It names no class.")
    group_radius: float = Field(description="Certified L2 radius of the group at the model input.")
    group_upload_radius: float = Field(description="Certified L2 radius of the group at the upload's pixels.")
    top: list[ClassVotes] = Field(description="Up to five classes by estimation votes.")
    reason: str | None = Field(description="Why no class is certified.")
    stopped: str | None = Field(description="What ended the run: radius, tolerance, futility, n, cap or deadline.")
    certificate: dict[str, Any] = Field(description="Self-contained; identical for identical requests.")
    certificate_jws: str | None = Field(
        description="The certificate as a JWS (RS256), signed by the key that `/.well-known/jwks.json` gives."
    )
    issued_at: str
    timing_ms: Timing


class ShortAnswer(BaseModel):
    """What a model with `reveal: bucket` or `decision` answers. The operator keeps the certificate for auditors."""

    label: str | None
    class_id: int | None
    abstained: bool
    radius: float = Field(description="The radius of the model's grid that is certified; 0 if none is.")
    claim: dict[str, Any] = Field(description="What is claimed, with the digest of the withheld certificate.")
    claim_jws: str = Field(description="The claim as a JWS (RS256), signed by the key of the certificates.")
    issued_at: str


class Progress(BaseModel):
    """What is proved so far: a certificate that stands, whatever comes after it."""

    label: str | None
    class_id: int | None
    abstained: bool
    n: int = Field(description="Estimation votes that it rests on.")
    radius: float
    upload_radius: float
    group: str | None
    group_radius: float
    group_upload_radius: float
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
    reveal: str = Field(description="What answers show of the radius: radius, bucket or decision.")
    bucket_grid: list[float] = Field(description="The radii that buckets and decisions are about.")


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
        group=certificate.group,
        group_radius=certificate.group_radius,
        group_upload_radius=certificate.group_upload_radius,
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
        level=certificate.level,
        group=certificate.group,
        group_radius=certificate.group_radius,
        group_upload_radius=certificate.group_upload_radius,
        top=[ClassVotes(label=label, class_id=c, votes=n) for label, c, n in ranked(certificate, classes)],
        reason=certificate.reason,
        stopped=certificate.stopped,
        certificate=certificate.to_json(),
        certificate_jws=jws,
        issued_at=_now(),
        timing_ms=timing,
    )


def short_answer(claim: ShortClaim, jws: str) -> ShortAnswer:
    """Returns the answer that carries a short claim. It has no times of this request: they follow the votes."""
    return ShortAnswer(
        label=claim.label,
        class_id=claim.class_id,
        abstained=claim.abstained,
        radius=claim.radius,
        claim=claim.to_json(),
        claim_jws=jws,
        issued_at=_now(),
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
