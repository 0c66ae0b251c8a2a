"""Short claims say no more than their grid, name the certificate behind them, and are checked with or without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brightness import config, image, issuer
from checking import Made, changed
from click.testing import CliRunner
from pydantic import ValidationError

from macer_serve.cli import main
from macer_serve.errors import OutputError, ParameterError, ServingError
from macer_serve.issuing import CLAIM, Issuer
from macer_serve.serving import withholding
from macer_serve.serving.query import PredictQuery
from macer_serve.serving.schemas import short_answer
from macer_serve.serving.settings import AppSettings, ModelSettings
from macer_serve.serving.withholding import asked_radius, plan_radius, withhold
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.short_claim import ShortClaim, digest_of
from macer_serve.verification import Verdict, Verification
from macer_serve.verification.short_claims import read_claim, verify_claim
from macer_serve.voters import Voter

GRID = (0.1, 0.25)
BUCKET = ModelSettings(checkpoint="x", tolerance=0.1, reveal="bucket", bucket_grid=GRID)
DECISION = ModelSettings(checkpoint="x", radius=0.25, reveal="decision", bucket_grid=GRID)
FIXED = ModelSettings(checkpoint="x", reveal="decision", bucket_grid=GRID)
# The key of the tests is another in each run, and so are noise and radii: these hold any of them in one bucket.
WIDE = ModelSettings(checkpoint="x", tolerance=0.1, reveal="bucket", bucket_grid=(0.001, 9.0))
YES_OR_NO = ModelSettings(checkpoint="x", radius=0.001, reveal="decision", bucket_grid=(0.001, 9.0))


def answer_of(
    c: Certificate, folder: Path, settings: ModelSettings = BUCKET, asked: float | None = None
) -> dict[str, Any]:
    """Returns the answer that a server gives about a certificate, which it keeps in the folder."""
    jws = issuer().sign(c.canonical())
    claim, signed = withhold(c, jws, settings, asked, str(folder), issuer())
    return short_answer(claim, signed).model_dump()


def checked(answer: dict[str, Any], pixels: Any, keys: Issuer | None = None, **given: Any) -> Verification:
    document = read_claim(json.dumps(answer).encode())
    assert document is not None
    return verify_claim(document, pixels, config(), keys=(keys or issuer()).keys, **given)


def kept(answer: dict[str, Any], folder: Path) -> bytes:
    return (folder / f"{answer['claim']['withheld'].removeprefix('sha256:')}.jws").read_bytes()


def test_the_claim_is_signed_and_its_evidence_withheld(honest: Made, tmp_path: Path, voters: dict[str, Voter]) -> None:
    for name in ("tolerance", "unanimous", "abstained", "two-sided", "soft", "resized", "radius refuted"):
        pixels, c = honest[name]
        answer = answer_of(c, tmp_path)
        assert checked(answer, pixels).verdict is Verdict.WITHHELD
        evidence = kept(answer, tmp_path)
        assert digest_of(evidence) == answer["claim"]["withheld"]
        whole = checked(answer, pixels, withheld=evidence, voter=voters.__getitem__)
        assert whole.verdict is Verdict.PROVED, [str(f) for f in whole.reasons]
        expected = max((r for r in GRID if r <= c.radius), default=0.0)
        assert (answer["radius"], answer["label"], answer["abstained"]) == (expected, c.label, c.abstained)


@pytest.mark.parametrize(("asked", "reached"), [(0.001, True), (9.0, False)])
def test_a_decision_tells_one_radius(honest: Made, tmp_path: Path, asked: float, reached: bool) -> None:
    pixels, c = honest["radius"]
    assert 0.001 <= c.radius < 9.0
    answer = answer_of(c, tmp_path, YES_OR_NO, asked)
    assert (answer["radius"], answer["abstained"]) == ((asked, False) if reached else (0.0, True))
    assert (answer["label"] is None) != reached
    assert checked(answer, pixels, withheld=kept(answer, tmp_path)).verdict is Verdict.CONSISTENT


def test_answers_of_one_bucket_differ_only_in_what_names_the_image(g: SmoothedClassifier, tmp_path: Path) -> None:
    plan = Plan(n0=50, n=5000, tolerance=0.05)
    certificates = [g.certify(image(level), plan) for level in (137, 138, 139, 140, 141)]
    of_one = [c for c in certificates if not c.abstained]
    first, *others = [answer_of(c, tmp_path, WIDE) for c in of_one]
    assert len({c.radius for c in of_one}) > 1
    for other in others:
        assert len(json.dumps(other)) == len(json.dumps(first))
        for answer in (first, other):
            del answer["issued_at"], answer["claim_jws"], answer["claim"]["withheld"]
        assert first["claim"].pop("input") != other["claim"].pop("input")
        assert first == other
        first = answer_of(of_one[0], tmp_path, WIDE)


def test_nothing_in_an_answer_follows_from_the_votes(honest: Made, tmp_path: Path) -> None:
    _, c = honest["two-sided"]
    answer = answer_of(c, tmp_path)
    names = {"model", "input", "policy", "key_id", "withheld"}  # digests have digits of their own
    said = {name: value for name, value in answer["claim"].items() if name not in names}
    text = json.dumps([said, answer["label"], answer["class_id"], answer["abstained"], answer["radius"]])
    for told in (c.radius, c.upload_radius, c.p_lower, c.p_upper, c.n, c.proof_n, c.seed_proof, c.statement, *c.votes):
        assert str(told) not in text or told in (0, *GRID), told
    telling = {
        "votes",
        "n",
        "proof_n",
        "p_lower",
        "p_upper",
        "seed_proof",
        "reason",
        "stopped",
        "top",
        "timing_ms",
        "plan",
    }
    assert not telling & (set(answer) | set(answer["claim"]))


def test_changed_claims_are_refused(honest: Made, tmp_path: Path) -> None:
    pixels, c = honest["tolerance"]
    answer = answer_of(c, tmp_path)
    for path, value in [
        (("radius",), 7.5), (("label",), "dark"), (("class_id",), 0), (("more",), 1), (("claim", "radius"), 7.5),
        (("claim", "alpha"), 1e-9), (("claim_jws",), answer["claim_jws"][:-8] + "AAAAAAAA"),
        (("claim_jws",), issuer().sign(c.canonical())),
    ]:  # fmt: skip
        try:
            verdict = checked(changed(answer, path, value), pixels).verdict
        except ParameterError:
            verdict = Verdict.NOT_READABLE
        assert verdict.refutes, path
    assert checked(answer, image(3)).verdict is Verdict.OTHER_SUBJECT
    assert checked(answer, pixels, Issuer.new()).verdict is Verdict.OTHER_KEY
    unsigned = {name: value for name, value in answer.items() if name != "claim_jws"}
    assert checked(unsigned, pixels).verdict is Verdict.NOT_AUTHENTICATED


def test_the_issuers_own_lies_are_contradicted_by_the_certificate(honest: Made, tmp_path: Path) -> None:
    pixels, c = honest["tolerance"]
    answer = answer_of(c, tmp_path)
    evidence = kept(answer, tmp_path)
    for name, value in [("radius", 7.5), ("alpha", 1e-9), ("class_id", 0), ("policy", "sha256:" + 64 * "0")]:
        claim = ShortClaim.from_json({**answer["claim"], name: value})
        lie = {"claim": claim.to_json(), "claim_jws": issuer().sign(claim.canonical(), CLAIM)}
        assert checked(lie, pixels, withheld=evidence).verdict.refutes, name
    other = issuer().sign(honest["fixed"][1].canonical()).encode()
    assert checked(answer, pixels, withheld=other).verdict is Verdict.ALTERED


# What requests may ask for, and settings


@pytest.mark.parametrize("settings", [BUCKET, DECISION, FIXED])
def test_requests_that_would_show_the_radius_are_refused(settings: ModelSettings) -> None:
    for more in (
        {"n": 10},
        {"alpha": 0.01},
        {"tolerance": 0.1},
        {"timeout_s": 1},
        {"radius": 0.2},
        {"mode": "predict"},
    ):
        with pytest.raises(ParameterError):
            asked_radius(settings, PredictQuery(**more))  # type: ignore[arg-type]


def test_the_radius_of_a_decision() -> None:
    for settings, named, asked, of_plan in [
        (BUCKET, None, None, None), (BUCKET, 0.1, None, 0.1), (DECISION, None, 0.25, 0.25), (DECISION, 0.1, 0.1, 0.1),
        (FIXED, None, 0.1, None), (FIXED, 0.25, 0.25, None),
    ]:  # fmt: skip
        query = PredictQuery(radius=named)
        assert asked_radius(settings, query) == asked
        assert plan_radius(settings, query, asked) == of_plan
        settings.asked(radius=of_plan)


def test_settings_without_a_place_or_a_grid_are_refused(tmp_path: Path) -> None:
    model = {"checkpoint": "x", "reveal": "bucket", "bucket_grid": [0.25, 0.5]}
    assert AppSettings.model_validate({"models": {"m": model}, "withheld_dir": str(tmp_path)})
    for wrong, words in [
        ({"models": {"m": model}}, "withheld_dir"),
        ({"models": {"m": {**model, "bucket_grid": []}}, "withheld_dir": "x"}, "bucket_grid belongs"),
        ({"models": {"m": {**model, "bucket_grid": [0.5, 0.25]}}, "withheld_dir": "x"}, "rising order"),
        ({"models": {"m": {**model, "reveal": "radius"}}}, "bucket_grid belongs"),
    ]:
        with pytest.raises(ValidationError, match=words):
            AppSettings.model_validate(wrong)
    (tmp_path / "file").touch()
    with pytest.raises(ParameterError, match="withheld_dir"):
        withholding.require_writable(str(tmp_path / "file" / "folder"))


def test_no_claim_without_its_evidence(honest: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Any:
        raise OutputError(f"{path} cannot be written: no space")

    monkeypatch.setattr(withholding, "atomic_file", full)
    with pytest.raises(ServingError) as raised:
        answer_of(honest["fixed"][1], tmp_path)
    assert str(tmp_path) not in str(raised.value)


# The command, about the bundled model


def test_the_command_checks_a_claim(tmp_path: Path) -> None:
    g = SmoothedClassifier.load("bundled:cifar10", issuer=issuer())
    try:
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        from PIL import Image

        Image.fromarray(pixels).save(tmp_path / "image.png")
        folder = tmp_path / "withheld"
        answer = answer_of(g.certify(pixels, Plan(n0=50, n=300)), folder)
    finally:
        assert g.voter is not None
        g.voter.close()
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    (tmp_path / "issuer.jwks").write_text(issuer().keys.to_json())
    arguments = [
        "verify",
        str(tmp_path / "answer.json"),
        str(tmp_path / "image.png"),
        "--key",
        str(tmp_path / "issuer.jwks"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (22, "signed, evidence withheld")
    for shown in (folder, next(folder.iterdir())):
        result = CliRunner().invoke(main, [*arguments, "--withheld", str(shown)])
        assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "proved"), result.output
