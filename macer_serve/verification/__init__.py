"""Checking certificates that someone else issued: consistency of the record, and a test by votes of one's own.

    certificate, answer = read_certificate(Path("certificate.json").read_bytes())
    report = verify(certificate, "image.png", load_config("bundled:cifar10"), answer=answer)
    report.verdict, report.findings

With the issuer's secret, the mac and the votes themselves are checked, so that a consistent but invented record is
found out. Without the secret, fresh votes are drawn. They contradict only a claim that is clearly too high.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.errors import InconsistentError, MismatchError, ParameterError
from macer_serve.images import MAX_PIXELS, UploadLimits
from macer_serve.inputs import Image
from macer_serve.smoothed import Question, SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.noise import NoiseKind, kind_of
from macer_serve.verification.engines import refused_batch
from macer_serve.verification.findings import Finding, Verification, agrees, holds, shown, unchecked
from macer_serve.verification.reading import read_certificate
from macer_serve.verification.record import Basis, examine_record
from macer_serve.verification.votes import Progress, met_by_fresh_votes, recounted
from macer_serve.voters import Voter

__all__ = ["FRESH_VOTES", "Finding", "Verification", "read_certificate", "verify"]

FRESH_VOTES = 10_000
# The image is an auditor's own file, and the issuer may have accepted larger uploads than our server does.
_LIMITS = UploadLimits(bytes=2**28, pixels=MAX_PIXELS)


def verify(
    certificate: Certificate,
    image: Image,
    config: CheckpointConfig,
    *,
    answer: dict[str, Any] | None = None,
    secret: bytes | None = None,
    votes: int = FRESH_VOTES,
    voter: Callable[[NoiseKind], Voter] | None = None,
    seed: bytes | None = None,
    progress: Progress = lambda done, total: None,
) -> Verification:
    """Returns what holds of the certificate, about this image and the checkpoint of `config`.

    `voter` opens a voter of the checkpoint for a noise. It is called only if votes are to be drawn; if it is None, none
    are. With the issuer's `secret` the record's votes are counted again. Without it, or if the engine is not the
    record's, `votes` fresh votes are drawn under `seed` (default: a random seed). `answer` is the document that the
    certificate came in. Raises `UploadError` for an unacceptable image, `ParameterError` for a number of votes outside
    0 to 10,000,000.
    """
    if not 0 <= votes <= 10**7:
        raise ParameterError(f"votes must lie between 0 and 10,000,000, not {votes}")
    same_model = certificate.model.get("digest") == config.digest
    no_classes = "its labels are not known: the checkpoint is another"
    found, basis = examine_record(certificate, config.classes if same_model else None, no_classes)
    found += _around(certificate, answer)
    kind = kind_of(certificate.noise)
    classifier = SmoothedClassifier(config, noise=kind or "exact", secret=secret, limits=_LIMITS)
    question = classifier.question(image)
    found += _model(certificate, config, basis)
    found += _input(certificate, question, same_model)
    if same_model and kind and certificate.input.get("digest") == question.digest:
        found += _tau(certificate, classifier.noise.tau(question.x))
    found.append(_mac(certificate, secret))
    blamed = [f.check for f in found if f.outcome == "does not hold" and f.check != "mac"]
    if blamed or basis is None or kind is None:
        why = f"{', '.join(blamed)} must hold first"
        return Verification((*found, unchecked("votes counted again", why), unchecked("fresh votes", why)))
    found += _votes(certificate, basis, question, kind, secret, votes, voter, seed, progress)
    return Verification(tuple(found))


def _around(c: Certificate, answer: dict[str, Any] | None) -> list[Finding]:
    """Returns whether the answer around the certificate says what the certificate says."""
    if answer is None:
        return []
    names = ("label", "class_id", "abstained", "radius", "upload_radius", "reason", "stopped", "n")
    other = [name for name in names if name in answer and answer[name] != getattr(c, name)]
    if other:
        words = "; ".join(f"{name} {shown(answer[name])}, not {shown(getattr(c, name))}" for name in other)
        return [Finding("answer", "does not hold", f"around the certificate, other values: {words}")]
    return [holds("answer", "says what the certificate in it says")]


def _model(c: Certificate, config: CheckpointConfig, basis: Basis | None) -> list[Finding]:
    if c.model.get("digest") != config.digest:
        words = f"{shown(c.model)} is recorded; the checkpoint is {config.name}, {config.digest}: name the record's"
        return [Finding("model.digest", "does not hold", words, MismatchError)]
    found = [
        holds("model.digest", f"{config.digest[:23]}... is the checkpoint's"),
        agrees("model.name", c.model, {"name": config.name, "digest": config.digest}, "the checkpoint"),
        agrees("sigma of the checkpoint", float(c.sigma), float(config.sigma), "the checkpoint"),
    ]
    if basis is not None:
        found.append(agrees("classes of the checkpoint", len(basis.votes), len(config.classes), "the checkpoint"))
    return found


def _input(c: Certificate, question: Question, same_model: bool) -> list[Finding]:
    """Returns whether the image is the record's, by its size and by the digest of the model input."""
    if c.input.get("upload_shape") != list(question.upload_shape):
        words = f"{shown(c.input.get('upload_shape'))} is recorded, the image is {shown(list(question.upload_shape))}"
        return [Finding("image", "does not hold", words, MismatchError)]
    fit = question.fit.to_json()
    same_sizes = {k: v for k, v in fit.items() if k != "norm"} == {k: v for k, v in c.fit.items() if k != "norm"}
    if not same_sizes and not same_model:
        return [unchecked("input.digest", "the checkpoint, and so the fit, is another")]
    if not same_sizes:
        return [
            Finding(
                "fit of the checkpoint",
                "does not hold",
                f"{shown(c.fit)} is recorded, the checkpoint's is {shown(fit)}",
            )
        ]
    if set(c.input) != {"digest", "shape", "upload_shape"}:
        return [Finding("input", "does not hold", f"{shown(c.input)} is no input")]
    if c.input["digest"] != question.digest:
        words = f"{shown(c.input['digest'])} is recorded, the image's is {question.digest}: another image, or changed"
        return [Finding("input.digest", "does not hold", words, MismatchError)]
    return [holds("input.digest", f"{question.digest[:23]}... is the image's")]


def _tau(c: Certificate, tau: float) -> list[Finding]:
    """Returns a finding if the record's tau is not that of this input: only the input shows if it is on the lattice."""
    return [] if c.tau == tau else [agrees("tau", float(c.tau), tau, "the image", error=InconsistentError)]


def _mac(c: Certificate, secret: bytes | None) -> Finding:
    if secret is None:
        return unchecked("mac", "it takes the issuer's secret")
    if c.is_authentic(secret):
        return holds("mac", "the record is as it was issued under this secret")
    if c.mac is None:
        return Finding("mac", "does not hold", "the record has none")
    return Finding("mac", "does not hold", "not this record's under this secret: changed, or issued under another")


def _votes(
    c: Certificate,
    basis: Basis,
    question: Question,
    kind: NoiseKind,
    secret: bytes | None,
    votes: int,
    voter: Callable[[NoiseKind], Voter] | None,
    seed: bytes | None,
    progress: Progress,
) -> list[Finding]:
    """Returns the findings of counting the record's votes again, or of testing the record by fresh votes."""
    again, fresh = "votes counted again", "fresh votes"
    if voter is None or (secret is None and not votes):
        why = "no votes were to be drawn"
        return [unchecked(again, why), unchecked(fresh, why)]
    engine = voter(kind)
    if secret is None:
        found = [unchecked(again, "it takes the issuer's secret")]
    elif engine.engine == c.engine:
        return [recounted(basis, question, engine, progress)]
    else:
        refused = refused_batch(c.engine, question.x.shape[0] * question.x.shape[1])
        words = (
            f"the record's engine is {shown(c.engine)}, this machine's {engine.engine}: not the same function, bit for "
            "bit, and identical votes cannot be demanded"
        )
        found = [unchecked(again, f"{words}; {refused}" if refused else words)]
    if not votes:
        return [*found, unchecked(fresh, "none were to be drawn")]
    return [*found, met_by_fresh_votes(c, basis, question, engine, votes, seed, progress)]
