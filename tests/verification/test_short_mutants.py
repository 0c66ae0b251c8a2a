"""Whoever lacks the private key cannot make a short claim, or a coarse answer, that any check accepts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from brightness import config, image, issuer
from checking import Made
from coarse_records import CONFIG, IMAGE, PLANS, certificate
from mutations import Trial, base64url, mutated

from macer_serve.issuing import CLAIM, Issuer
from macer_serve.serving.schemas import short_answer
from macer_serve.serving.settings import ModelSettings
from macer_serve.serving.withholding import withhold
from macer_serve.smoothing.certificate import Certificate
from macer_serve.verification import Verdict, read_document, verify
from macer_serve.verification.short_claims import read_claim, verify_claim

MUTANTS = int(os.environ.get("MACER_MUTANTS", "400"))  # more were made once: results/mutants.txt
ATTACKER = Issuer.new()
MODELS = [
    ModelSettings(checkpoint="x", tolerance=0.1, reveal="bucket", bucket_grid=(0.1, 0.25)),
    ModelSettings(checkpoint="x", radius=0.1, reveal="decision", bucket_grid=(0.1, 0.25)),
]


def short(c: Certificate, folder: Path, model: ModelSettings, by: Issuer | None = None) -> tuple[dict[str, Any], bytes]:
    """Returns a short answer about a certificate, and the evidence that its operator keeps."""
    by = by or issuer()
    asked = model.radius if model.reveal == "decision" else None
    claim, signed = withhold(c, by.sign(c.canonical()), model, asked, str(folder), by)
    evidence = (folder / f"{claim.withheld.removeprefix('sha256:')}.jws").read_bytes()
    return short_answer(claim, signed).model_dump(), evidence


def attempts(honest: Made, folder: Path, dice: np.random.Generator) -> Iterator[tuple[str, Any, Any, bytes | None]]:
    """Yields what was tried, the document, the image that it is said to be about, and what is shown as withheld."""
    names = ["tolerance", "unanimous", "abstained", "two-sided", "soft", "resized", "radius refuted"]
    made = [(name, model, *short(honest[name][1], folder, model)) for name in names for model in MODELS]
    while True:
        name, model, answer, evidence = made[int(dice.integers(len(made)))]
        _, _, joined, others_evidence = made[int(dice.integers(len(made)))]
        pixels, jws = honest[name][0], answer["claim_jws"]
        shown = evidence if dice.random() < 0.5 else None
        header, payload, signature = jws.split(".")
        timeless = {key: value for key, value in answer.items() if key != "issued_at"}  # which nobody signs
        if (changes := mutated(timeless, dice)) != timeless:
            yield "answer changed", changes, pixels, shown
        if (claim := mutated(answer["claim"], dice)) != answer["claim"]:
            forged = f"{header}.{base64url(json.dumps(claim).encode())}.{signature}"
            yield "claim changed", {**answer, "claim": claim}, pixels, shown
            yield "claim and payload changed", {"claim": claim, "claim_jws": forged}, pixels, shown
            yield "unsigned", {"claim": claim}, pixels, shown
            own = ATTACKER.sign(json.dumps(claim).encode(), CLAIM)
            yield "own key, changed", {"claim": claim, "claim_jws": own}, pixels, shown
        own_answer, own_evidence = short(honest[name][1], folder, model, ATTACKER)
        yield "own key", own_answer, pixels, shown
        yield "own key and evidence", own_answer, pixels, own_evidence
        yield "own evidence", answer, pixels, own_evidence
        yield "another image", answer, image(int(dice.integers(0, 256)) | 1), shown
        if joined["claim"] != answer["claim"]:
            yield "joined", {**answer, "claim_jws": joined["claim_jws"]}, pixels, shown
            yield "joined", {**joined, "claim": answer["claim"]}, pixels, shown
        if others_evidence != evidence:
            yield "evidence of another", answer, pixels, others_evidence
        cut = int(dice.integers(len(evidence)))
        yield "evidence cut", answer, pixels, evidence[:cut]
        yield "certificate as claim", {**answer, "claim_jws": issuer().sign(honest[name][1].canonical())}, pixels, shown
        for alg in ("none", "HS256", "PS256"):
            head = base64url(json.dumps({"alg": alg, "kid": issuer().key_id, "typ": "macer-claim+jws"}).encode())
            yield f"alg {alg}", {**answer, "claim_jws": f"{head}.{payload}.{signature}"}, pixels, shown


def test_no_mutant_of_a_short_claim_is_accepted(honest: Made, tmp_path: Path) -> None:
    trial, made = Trial(), attempts(honest, tmp_path, np.random.default_rng(17))
    for what, document, pixels, shown in islice(made, MUTANTS):

        def check(document: Any = document, pixels: Any = pixels, shown: bytes | None = shown) -> Verdict:
            claim = read_claim(json.dumps(document).encode())
            assert claim is not None
            return verify_claim(claim, pixels, config(), keys=issuer().keys, withheld=shown).verdict

        trial.judge(what, document, check)
    trial.end("short claims", kinds=14)


def coarse_attempts(dice: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """Yields what was tried, and the document."""
    records = [certificate(plan).to_json() for plan in PLANS]
    signed = [issuer().sign(json.dumps(record).encode()) for record in records]
    telling = ["group", "level", "group_radius", "group_upload_radius", "label", "abstained", "plan"]
    while True:
        chosen, other = (int(dice.integers(len(records))) for _ in range(2))
        record, jws = records[chosen], signed[chosen]
        fields = [name for name in telling if dice.random() < 0.5]
        part = mutated({name: record[name] for name in fields}, dice) if fields else {}
        if (changes := {**record, **part}) == record:
            continue
        header, _, signature = jws.split(".")
        forged = f"{header}.{base64url(json.dumps(changes).encode())}.{signature}"
        own = ATTACKER.sign(json.dumps(changes).encode())
        yield "copy changed", {"certificate": changes, "certificate_jws": jws}
        yield "copy and payload changed", {"certificate": changes, "certificate_jws": forged}
        yield "unsigned", {"certificate": changes}
        yield "own key", {"certificate": changes, "certificate_jws": own}
        yield "joined", {"certificate": changes, "certificate_jws": signed[other]}


def test_no_mutant_of_a_coarse_answer_is_accepted() -> None:
    trial = Trial()
    for what, document in islice(coarse_attempts(np.random.default_rng(18)), MUTANTS):

        def check(document: Any = document) -> Verdict:
            return verify(read_document(json.dumps(document).encode()), IMAGE, CONFIG, keys=issuer().keys).verdict

        trial.judge(what, document, check)
    trial.end("coarse answers", kinds=5)
