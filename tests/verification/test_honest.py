"""Honest certificates of every kind are proved, and what was not checked is not said to be."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from brightness import SEEDS, config, image, issuer
from checking import FIXED, Made, check, document_of, failed, lines

from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import ranked
from macer_serve.verification import Verdict, read_document, verify
from macer_serve.voters import Voter


def test_honest_certificates_are_proved(honest: Made, voters: dict[str, Voter]) -> None:
    ended = set()
    for name, (pixels, c) in honest.items():
        report = check(c, pixels, voters)
        assert report.verdict is Verdict.PROVED, (name, report.reasons)
        assert set(lines(report).values()) == {"holds"}, name
        assert {"signature", "seed_proof", "policy", "votes counted again"} <= set(lines(report))
        ended.add((c.plan["mode"], c.plan["kind"], c.stopped, c.abstained))
    assert {stopped for *_, stopped, _ in ended} == {"n", "cap", "deadline", "radius", "futility", "tolerance", None}
    assert ("certify", "tolerance", "deadline", False) in ended  # proved something, though interrupted
    assert ("predict", "fixed", "n", False) in ended


def test_what_was_not_checked_is_named(honest: Made, voters: dict[str, Voter]) -> None:
    pixels, c = honest["fixed"]
    report = check(c, pixels)
    assert (report.verdict, failed(report)) == (Verdict.CONSISTENT, set())
    assert [f.check for f in report.not_checked] == ["votes counted again"]
    report = verify(document_of(c.to_json()), pixels, config(), voter=voters.__getitem__)  # without keys
    assert report.verdict is Verdict.NOT_AUTHENTICATED
    assert [f.check for f in report.not_checked] == ["signature", "seed_proof"]
    assert lines(report)["votes counted again"] == "holds"
    report = check(c, pixels, voters, sign=False)
    assert report.verdict is Verdict.NOT_AUTHENTICATED


def test_a_record_under_a_seed_that_an_evaluator_chose_is_not_proved(voters: dict[str, Voter]) -> None:
    c = SmoothedClassifier(config(), voter=voters["exact"], issuer=SEEDS).certify(image(140), FIXED)
    report = check(c, image(140), voters, sign=False)
    assert report.verdict is Verdict.NOT_AUTHENTICATED
    assert "chose the seed" in {f.check: f.words for f in report.findings}["seed_proof"]


def test_every_form_of_a_document_is_read(honest: Made) -> None:
    _, c = honest["fixed"]
    jws = issuer().sign(c.canonical())
    answer = {"label": c.label, "certificate": c.to_json(), "certificate_jws": jws}
    assert read_document(jws.encode() + b"\n").jws == jws
    assert read_document(json.dumps(answer).encode()).certificate == c
    assert read_document(json.dumps(c.to_json()).encode()).certificate == c


def test_the_answer_around_a_certificate_must_say_the_same(honest: Made, voters: dict[str, Voter]) -> None:
    """The answer is not signed: what it says must be in the certificate, or follow from it."""
    pixels, c = honest["tolerance"]
    top = [dict(zip(("label", "class_id", "votes"), row, strict=True)) for row in ranked(c, config().classes)]
    answer: dict[str, Any] = {name: getattr(c, name) for name in ("label", "class_id", "radius", "reason", "stopped")}
    answer |= {"top": top, "timing_ms": {"queue": 1.0}, "issued_at": "2026-01-01T00:00:00Z"}
    answer |= {"certificate": c.to_json(), "certificate_jws": issuer().sign(c.canonical())}

    def verdict(**changes: Any) -> tuple[Verdict, set[str]]:
        document = read_document(json.dumps({**answer, **changes}).encode())
        report = verify(document, pixels, config(), keys=issuer().keys, voter=voters.__getitem__)
        return report.verdict, failed(report)

    assert verdict() == (Verdict.PROVED, set())
    invented = [{**top[0], "votes": top[0]["votes"] + 1}, *top[1:]]
    for name, value in (
        ("radius", 3.0), ("label", "dark"), ("top", invented), ("top", []), ("safe", True), ("stopped", None),
    ):  # fmt: skip
        found, names = verdict(**{name: value})
        assert found in (Verdict.ALTERED, Verdict.CONTRADICTED), name
        assert any(name in check for check in names), names
    found, names = verdict(certificate={**c.to_json(), "radius": 3.0})
    assert names == {"radius, beside the signature"}


def test_plain_noise(voters: dict[str, Voter]) -> None:
    g = SmoothedClassifier(config(), voter=voters["gaussian"], noise="gaussian", issuer=issuer())
    report = check(g.certify(image(140), FIXED), image(140), voters)
    assert report.verdict is Verdict.PROVED
    assert any("floating-point error" in f.words for f in report.findings if f.check == "noise")


def test_no_votes_are_drawn_if_the_record_is_refused(honest: Made) -> None:
    def refuse(kind: str) -> Voter:
        raise AssertionError("a network was warmed up")

    _, c = honest["fixed"]
    assert verify(document_of(c.to_json()), image(90), config(), voter=refuse).verdict.refutes


def test_a_record_from_javascript_is_proved(honest: Made, voters: dict[str, Voter]) -> None:
    """A page or jq writes 1 for 1.0 in the copy beside the signature."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return int(value) if isinstance(value, float) and value.is_integer() else value

    for name in ("abstained", "fixed"):
        pixels, c = honest[name]
        document = {"certificate": plain(c.to_json()), "certificate_jws": issuer().sign(c.canonical())}
        read = read_document(json.dumps(document).encode())
        report = verify(read, pixels, config(), keys=issuer().keys, voter=voters.__getitem__)
        assert report.verdict is Verdict.PROVED, report.reasons


def test_last_digits_may_be_those_of_another_library_and_no_more(honest: Made) -> None:
    pixels, c = honest["two-sided tolerance"]
    near = dataclasses.replace(c, p_lower=c.p_lower * (1 - 1e-14), p_upper=c.p_upper * (1 + 1e-14))
    assert check(near, pixels).verdict is Verdict.CONSISTENT
    far = dataclasses.replace(c, p_lower=c.p_lower + 1e-8)
    assert failed(check(far, pixels)) == {"p_lower"}
