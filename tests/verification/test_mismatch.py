"""Another image, checkpoint, key or engine is named as such."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from brightness import brightness, config, image, issuer
from checking import Made, check, document_of, failed, lines

from macer_serve.issuing import Issuer
from macer_serve.verification import Verdict, verify
from macer_serve.voters import Voter

OTHER = Issuer.new()


def test_another_image_or_checkpoint(honest: Made) -> None:
    pixels, c = honest["fixed"]
    brighter = pixels.copy()
    brighter[0, 0, 0] += 1
    for other in (brighter, image(139), pixels.transpose(1, 0, 2).copy(), np.zeros((8, 8, 3), np.uint8)):
        report = check(c, other)
        assert report.verdict is Verdict.OTHER_SUBJECT
        assert lines(report)["votes counted again"] == "not checked"
    document = document_of(c.to_json())
    changes: list[dict[str, Any]] = [{"sigma": 0.5}, {"resize": 5}, {"classes": ("a", "b", "c", "d")}]
    for change in changes:
        report = verify(document, pixels, config(**change), keys=issuer().keys)
        assert report.verdict is Verdict.OTHER_SUBJECT, change
        assert failed(report) == {"model.digest"}
        assert lines(report)["label"] == "not checked"
        assert lines(report)["signature"] == "holds"


def test_another_key(honest: Made, voters: dict[str, Voter]) -> None:
    pixels, c = honest["fixed"]
    report = check(c, pixels, voters, keys=OTHER.keys)
    assert (report.verdict, failed(report)) == (Verdict.OTHER_KEY, {"key_id"})
    # Signed anew by another issuer: the seed is not that issuer's.
    report = check(c, pixels, voters, keys=OTHER.keys, by=OTHER)
    assert failed(report) == {"key_id", "seed_proof"}
    assert report.verdict.refutes


def test_a_retired_key_still_proves(honest: Made, voters: dict[str, Voter]) -> None:
    pixels, c = honest["fixed"]
    successor = Issuer.new(retired=issuer().keys)
    report = check(c, pixels, voters, keys=successor.keys)
    assert report.verdict is Verdict.PROVED
    assert "retired key" in {f.check: f.words for f in report.findings}["signature"]


def test_another_engine_is_compared_on_the_same_copies(honest: Made) -> None:
    for name in ("fixed", "tolerance", "two-sided", "soft", "predict", "abstained", "deadline at once"):
        pixels, c = honest[name]
        with brightness(batch=100) as other:
            assert other.engine != c.engine
            report = verify(
                document_of(c.to_json()), pixels, config(), keys=issuer().keys, voter=lambda kind, other=other: other
            )
        assert report.verdict is Verdict.OTHER_ENGINE, name
        (found,) = report.not_checked
        assert json.dumps(c.engine)[1:-1] in found.words
        if name in ("fixed", "tolerance", "two-sided"):  # the same function here: the very same votes
            assert "At least 0 of" in found.words
            assert f"certify class {c.class_id} with radius {c.radius:.6f}" in found.words
