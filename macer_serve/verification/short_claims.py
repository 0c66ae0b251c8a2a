"""Checking short claims, which name a certificate that their operator keeps, and the certificate if it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.errors import OtherKeyError, ParameterError, VerificationError
from macer_serve.images import MAX_PIXELS, UploadLimits
from macer_serve.inputs import Image
from macer_serve.issuing import CLAIM, KeySet
from macer_serve.issuing.jws import take_apart
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.noise import NoiseKind, kind_of
from macer_serve.smoothing.short_claim import ShortClaim, claim_statement, digest_of
from macer_serve.verification import verify
from macer_serve.verification.findings import Finding, Verification, agrees, escaped, fails, holds, shown, unchecked
from macer_serve.verification.reading import MAX_BYTES, json_of, jws_in, read_document, same
from macer_serve.verification.verdicts import Verdict
from macer_serve.verification.votes import Progress
from macer_serve.voters import Voter

_LIMITS = UploadLimits(bytes=2**28, pixels=MAX_PIXELS)
_COPIED = ("label", "class_id", "abstained", "radius")
_UNSIGNED = {"claim", "claim_jws", "issued_at"}


@dataclass(frozen=True, slots=True)
class ClaimDocument:
    """A short claim with its signed form and the answer around it, if they are there."""

    claim: ShortClaim
    jws: str | None
    answer: dict[str, Any]
    copied: bool  # whether the unsigned copy of the claim says what the signed claim says


def read_claim(data: bytes) -> ClaimDocument | None:
    """Returns the short claim in an answer or a JWS; None if the document holds none. Raises `ParameterError`."""
    try:
        return _read(data)
    except ParameterError as error:
        raise ParameterError(escaped(str(error))) from None


def _read(data: bytes) -> ClaimDocument | None:
    if len(data) > MAX_BYTES:
        return None  # refused as a certificate
    if (text := jws_in(data)) is not None:
        parts = take_apart(text)
        return None if parts.typ != CLAIM else ClaimDocument(_signed(text), text, {}, copied=True)
    document = json_of(data)
    if not isinstance(document, dict) or "claim" not in document or "certificate" in document:
        return None
    jws = document.get("claim_jws")
    if jws is None:
        return ClaimDocument(ShortClaim.from_json(document["claim"]), None, document, copied=True)
    if not isinstance(jws, str):
        raise ParameterError("not a short claim: claim_jws must be text")
    claim = _signed(jws)
    return ClaimDocument(claim, jws, document, copied=same(document["claim"], claim.to_json()))


def _signed(jws: str) -> ShortClaim:
    return ShortClaim.from_json(json_of(take_apart(jws).payload, "utf-8"))


def verify_claim(
    document: ClaimDocument,
    image: Image,
    config: CheckpointConfig,
    *,
    keys: KeySet | None = None,
    withheld: bytes | None = None,
    voter: Callable[[NoiseKind], Voter] | None = None,
    progress: Progress = lambda done, total: None,
) -> Verification:
    """Returns what holds of a short claim, about this image and checkpoint.

    `withheld` is the certificate that the claim names, as its operator kept it. With it everything is checked that
    `verify` checks. The other arguments and the errors are those of `verify`.
    """
    claim = document.claim
    found = _signature(document, keys)
    found += _around(document)
    found += _subject(claim, image, config)
    found.append(_statement(claim))
    if withheld is None:
        why = "the operator keeps the certificate: ask for the file " + claim.withheld.removeprefix("sha256:")[:80]
        found.append(unchecked("radius, votes, seed", f"{escaped(why)}.jws", Verdict.WITHHELD))
        return Verification(tuple(found))
    if digest_of(withheld.strip()) != claim.withheld:
        words = f"{shown(claim.withheld)} is claimed, the file's is {digest_of(withheld.strip())}"
        return Verification((*found, fails("withheld", words)))
    found.append(holds("withheld", f"{claim.withheld[:23]}... is the certificate's"))
    try:
        whole = read_document(withheld)
    except ParameterError as error:
        return Verification((*found, fails("withheld", f"it is no certificate: {error}", Verdict.CONTRADICTED)))
    found += _follows(claim, whole.certificate, whole.jws or "")
    report = verify(whole, image, config, keys=keys, voter=voter, progress=progress)
    return Verification((*found, *report.findings))


def _signature(document: ClaimDocument, keys: KeySet | None) -> list[Finding]:
    found = [] if document.copied else [fails("claim, beside the signature", "the unsigned copy says something else")]
    if document.jws is None:
        return [*found, unchecked("signature", "the document carries none", Verdict.NOT_AUTHENTICATED)]
    if keys is None:
        why = "no public keys of the issuer were given"
        return [*found, unchecked("signature", why, Verdict.NOT_AUTHENTICATED)]
    try:
        signed = keys.open(document.jws, CLAIM)
    except OtherKeyError as error:
        return [*found, fails("key_id", str(error), Verdict.OTHER_KEY)]
    except (VerificationError, ParameterError) as error:
        return [*found, fails("signature", str(error))]
    found.append(holds("signature", f"made with the key {signed.key.kid}"))
    return [*found, agrees("key_id", document.claim.key_id, signed.key.kid, "the signature")]


def _around(document: ClaimDocument) -> list[Finding]:
    """Returns whether the answer around the claim says what the claim says. It is not signed itself."""
    said = {name: getattr(document.claim, name) for name in _COPIED}
    found = [
        fails(f"answer.{name}", f"around the claim {shown(document.answer[name])}, in it {shown(value)}")
        for name, value in said.items()
        if name in document.answer and not same(document.answer[name], value)
    ]
    unknown = sorted(set(document.answer) - set(said) - _UNSIGNED)
    return [
        *found,
        *(fails(f"answer.{shown(name)}", "answers have no such field, and nobody signed it") for name in unknown),
    ]


def _subject(claim: ShortClaim, image: Image, config: CheckpointConfig) -> list[Finding]:
    """Returns whether the claim is about the checkpoint and the image, and has the checkpoint's label."""
    if claim.model.get("digest") != config.digest:
        words = f"{shown(claim.model)} is recorded; the checkpoint is {config.name}, {config.digest}: name the record's"
        return [fails("model.digest", words, Verdict.OTHER_SUBJECT)]
    digest = SmoothedClassifier(config, limits=_LIMITS).model_input(image).digest
    found = [
        holds("model.digest", f"{config.digest[:23]}... is the checkpoint's"),
        agrees("input.digest", claim.input.get("digest"), digest, "the image", means=Verdict.OTHER_SUBJECT),
        agrees("abstained", claim.abstained, claim.class_id is None, "class_id"),
    ]
    known = claim.class_id is None or 0 <= claim.class_id < len(config.classes)
    label = config.classes[claim.class_id] if known and claim.class_id is not None else None
    return [*found, agrees("label", claim.label, label, "class_id and the checkpoint")]


def _statement(claim: ShortClaim) -> Finding:
    try:
        said = claim_statement(claim.abstained, float(claim.radius), float(claim.alpha), claim.bound, claim.noise)
    except (ParameterError, ArithmeticError, ValueError) as error:
        return fails("statement", f"no statement follows from the claim: {escaped(str(error))}")
    if kind_of(claim.noise) is None:
        return fails("noise", f"{shown(claim.noise)} is no known noise")
    return agrees("statement", claim.statement, said, "radius, alpha, bound and noise")


def _follows(claim: ShortClaim, c: Certificate, jws: str) -> list[Finding]:
    """Returns whether every field of the claim follows from the certificate that it names."""
    if claim.reveal not in ("bucket", "decision") or (claim.asked is None) != (claim.reveal == "bucket"):
        return [fails("reveal", f"{shown(claim.reveal)} with asked {shown(claim.asked)} is no short claim")]
    lawful = ShortClaim.of(c, jws, reveal=claim.reveal, grid=claim.grid, asked=claim.asked).to_json()
    stated = claim.to_json()
    wrong = [name for name in stated if not same(stated[name], lawful[name])]
    return [
        fails(name, f"{shown(stated[name])} is claimed, {shown(lawful[name])} follows from the certificate")
        for name in wrong
    ] or [holds("claim", "every field follows from the certificate")]
