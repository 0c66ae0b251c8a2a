"""Checking certificates that someone else issued, without any secret.

    document = read_document(Path("answer.json").read_bytes())
    report = verify(document, "image.png", load_config("bundled:cifar10"), keys=KeySet.read(jwks), voter=open_voter)
    report.verdict, report.findings

The signature is checked, and everything that follows from the record is computed again. The noise seed is checked
against the input, the model and the policy. Then the votes are counted again on the very same noisy copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.errors import OtherKeyError, ParameterError, VerificationError
from macer_serve.images import MAX_PIXELS, UploadLimits
from macer_serve.inputs import Image
from macer_serve.issuing import IssuerKey, KeySet
from macer_serve.issuing.base64url import decode
from macer_serve.issuing.seeds import seed_of
from macer_serve.smoothed import ModelInput, SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate, ranked
from macer_serve.smoothing.noise import NoiseKind, kind_of
from macer_serve.smoothing.policy import policy_digest
from macer_serve.smoothing.votes import count
from macer_serve.verification.findings import Finding, Verification, agrees, fails, holds, shown, unchecked
from macer_serve.verification.reading import Document, read_document, same
from macer_serve.verification.record import Basis, examine_record
from macer_serve.verification.verdicts import Verdict
from macer_serve.verification.votes import RECOUNT, Progress, recounted
from macer_serve.voters import Voter

__all__ = ["Document", "Finding", "Verdict", "Verification", "read_document", "verify"]

MAX_UNSIGNED_VOTES = 10**6  # of a record that anybody may have made
# The image is an auditor's own file, and the issuer may have accepted larger uploads than our server does.
_LIMITS = UploadLimits(bytes=2**28, pixels=MAX_PIXELS)
# Fields of an answer that nobody signed, and that say nothing about the image.
_UNSIGNED = {"certificate", "certificate_jws", "issued_at", "timing_ms"}
_COPIED = (
    *("label", "class_id", "abstained", "radius", "upload_radius"),
    *("level", "group", "group_radius", "group_upload_radius", "reason", "stopped"),
)


def verify(
    document: Document,
    image: Image,
    config: CheckpointConfig,
    *,
    keys: KeySet | None = None,
    voter: Callable[[NoiseKind], Voter] | None = None,
    progress: Progress = lambda done, total: None,
) -> Verification:
    """Returns what holds of the certificate, about this image and the checkpoint of `config`.

    `keys` are the issuer's public keys, from a source that the auditor trusts. `voter` opens a voter of the checkpoint
    for a noise. It is called only if the votes can be counted again; if it is None, they are not. Raises `UploadError`
    for an unacceptable image, `IssuerKeyError` for a key that is refused.
    """
    c = document.certificate
    same_model = c.model.get("digest") == config.digest
    key, found = _signature(document, keys)
    found += _around(document, config if same_model else None)
    record, basis = examine_record(
        c,
        config.classes if same_model else None,
        "its labels are not known: the checkpoint is another",
        authentic=key is not None,
    )
    kind = kind_of(c.noise)
    classifier = SmoothedClassifier(config, noise=kind or "exact", limits=_LIMITS)
    model_input = classifier.model_input(image)
    record += _model(c, config, basis) + _input(c, model_input, same_model)
    if same_model and kind and c.input.get("digest") == model_input.digest:
        record += _tau(c, classifier.noise.tau(model_input.x))
    if key is not None:  # the issuer wrote what does not follow
        record = [replace(f, means=Verdict.CONTRADICTED) if f.means is Verdict.ALTERED else f for f in record]
    found += record
    seed, about_seed = _seed(c, basis, key)
    found += about_seed
    blamed = [f.check for f in found if f.outcome == "does not hold"]
    if blamed or basis is None or kind is None:
        found.append(unchecked(RECOUNT, f"{', '.join(blamed)} must hold first"))
    elif seed is None:
        found.append(unchecked(RECOUNT, "the record does not say from which seed its noise was drawn"))
    elif voter is None:
        found.append(unchecked(RECOUNT, "the votes were not to be counted again"))
    elif key is None and (total := count(basis.votes) + count(basis.selection_votes)) > MAX_UNSIGNED_VOTES:
        why = f"{total:,} votes are recorded, and more than {MAX_UNSIGNED_VOTES:,} are counted only if a signature "
        found.append(unchecked(RECOUNT, why + "of the record was checked: name the issuer's public key"))
    else:
        found.append(recounted(c, basis, model_input, seed, voter(kind), progress))
    return Verification(tuple(found))


def _signature(document: Document, keys: KeySet | None) -> tuple[IssuerKey | None, list[Finding]]:
    """Returns the key that signed the certificate, if its signature was checked and holds."""
    c = document.certificate
    beside = [
        fails(f"{name}, beside the signature", "the unsigned copy says something else") for name in document.beside
    ]
    if document.jws is None:
        return None, [unchecked("signature", "the document carries none", Verdict.NOT_AUTHENTICATED)]
    if keys is None:
        why = "no public keys of the issuer were given"
        return None, [unchecked("signature", why, Verdict.NOT_AUTHENTICATED), *beside]
    try:
        signed = keys.open(document.jws)
    except OtherKeyError as error:
        return None, [fails("key_id", str(error), Verdict.OTHER_KEY), *beside]
    except (VerificationError, ParameterError) as error:
        return None, [fails("signature", str(error)), *beside]
    state = "a retired key" if signed.key.retired else "the key"
    found = [holds("signature", f"made with {state} {signed.key.kid}"), *beside]
    if c.key_id != signed.key.kid:
        found.append(fails("key_id", f"{shown(c.key_id)} is recorded, {signed.key.kid} signed the record"))
    return signed.key, found


def _seed(c: Certificate, basis: Basis | None, key: IssuerKey | None) -> tuple[bytes | None, list[Finding]]:
    """Returns the noise seed that the record's proof gives, and whether it belongs to input, model and policy."""
    if basis is None:
        return None, [unchecked("policy, seed_proof", "the plan is unknown")]
    policy = policy_digest(basis.plan, c.noise)
    found = [agrees("policy", c.policy, policy, "plan and noise", means=Verdict.POLICY_NOT_FIXED)]
    if c.seed_proof is None:
        why = "there is none: whoever made the record chose the seed"
        return None, [*found, unchecked("seed_proof", why, Verdict.NOT_AUTHENTICATED)]
    try:
        if key is None:
            seed = seed_of(decode(c.seed_proof, "the seed proof"))
            return seed, [
                *found,
                unchecked("seed_proof", "it takes the issuer's public key", Verdict.NOT_AUTHENTICATED),
            ]
        seed = key.seed(
            c.seed_proof,
            input_digest=c.input.get("digest", ""),
            model_digest=c.model.get("digest", ""),
            policy_digest=policy,
        )
    except (ParameterError, VerificationError) as error:
        return None, [*found, fails("seed_proof", str(error), Verdict.POLICY_NOT_FIXED)]
    return seed, [*found, holds("seed_proof", "the noise seed belongs to this input, model and policy")]


def _around(document: Document, config: CheckpointConfig | None) -> list[Finding]:
    """Returns whether the answer around the certificate says what the certificate says. It is not signed itself."""
    answer, c = document.answer, document.certificate
    if answer is None:
        return []
    said: dict[str, Any] = {name: getattr(c, name) for name in _COPIED}
    unknown = sorted(set(answer) - set(said) - _UNSIGNED - {"top"})
    found = [
        fails(f"answer.{name}", f"around the certificate {shown(answer[name])}, in it {shown(value)}")
        for name, value in said.items()
        if name in answer and not same(answer[name], value)
    ]
    found += [fails(f"answer.{shown(name)}", "answers have no such field, and nobody signed it") for name in unknown]
    if "top" in answer and config is None:
        found.append(unchecked("answer.top", "the labels are those of another checkpoint"))
    elif "top" in answer and config is not None:
        try:
            top = [dict(zip(("label", "class_id", "votes"), row, strict=True)) for row in ranked(c, config.classes)]
        except (
            ParameterError,
            ValueError,
            IndexError,
            KeyError,
            TypeError,
        ):  # votes that cannot be read are named elsewhere
            top = []
        if not same(answer["top"], top):
            found.append(fails("answer.top", f"{shown(answer['top'])} is not what the votes say"))
    return found or [holds("answer", "says what the certificate in it says")]


def _model(c: Certificate, config: CheckpointConfig, basis: Basis | None) -> list[Finding]:
    if c.model.get("digest") != config.digest:
        words = f"{shown(c.model)} is recorded; the checkpoint is {config.name}, {config.digest}: name the record's"
        return [fails("model.digest", words, Verdict.OTHER_SUBJECT)]
    found = [
        holds("model.digest", f"{config.digest[:23]}... is the checkpoint's"),
        agrees("sigma of the checkpoint", float(c.sigma), float(config.sigma), "the checkpoint"),
    ]
    if set(c.model) != {"name", "digest"} or not isinstance(c.model["name"], str):
        found.append(fails("model", f"{shown(c.model)} is no model"))
    if basis is not None and c.group is not None:
        found.append(_groups(basis, config))
    if basis is not None:
        found.append(agrees("classes of the checkpoint", len(basis.votes), len(config.classes), "the checkpoint"))
    return found


def _groups(basis: Basis, config: CheckpointConfig) -> Finding:
    """Returns whether the groups are those of the checkpoint. The record states them, and the seed is bound to them."""
    if basis.plan.hierarchy == config.hierarchy:
        return holds("plan.hierarchy", "the groups are the checkpoint's")
    return unchecked("plan.hierarchy", "the checkpoint has other groups: read in the record which classes each one has")


def _input(c: Certificate, model_input: ModelInput, same_model: bool) -> list[Finding]:
    """Returns whether the image is the record's, by its size and by the digest of the model input."""
    upload_shape = list(model_input.upload_shape)
    if c.input.get("upload_shape") != upload_shape:
        words = f"{shown(c.input.get('upload_shape'))} is recorded, the image is {upload_shape}"
        return [fails("image", words, Verdict.OTHER_SUBJECT)]
    fit = model_input.fit.to_json()
    same_sizes = {k: v for k, v in fit.items() if k != "norm"} == {k: v for k, v in c.fit.items() if k != "norm"}
    if not same_sizes and not same_model:
        return [unchecked("input.digest", "the checkpoint, and so the fit, is another")]
    if not same_sizes:
        return [fails("fit of the checkpoint", f"{shown(c.fit)} is recorded, the checkpoint's is {shown(fit)}")]
    if set(c.input) != {"digest", "shape", "upload_shape"}:
        return [fails("input", f"{shown(c.input)} is no input")]
    if c.input["digest"] != model_input.digest:
        words = (
            f"{shown(c.input['digest'])} is recorded, the image's is {model_input.digest}: another image, or changed"
        )
        return [fails("input.digest", words, Verdict.OTHER_SUBJECT)]
    return [holds("input.digest", f"{model_input.digest[:23]}... is the image's")]


def _tau(c: Certificate, tau: float) -> list[Finding]:
    """Returns a finding if the record's tau is not that of this input: only the input shows if it is on the lattice."""
    return [] if c.tau == tau else [agrees("tau", float(c.tau), tau, "the image")]
