"""Another image, checkpoint or secret is named as such, and another engine is not held to the same votes."""

from __future__ import annotations

import numpy as np
from brightness import SECRET, brightness, config, image
from checking import OTHER, Made, check, failed, lines

from macer_serve.errors import InconsistentError, MismatchError
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.verification import verify
from macer_serve.voters import Voter


def test_another_image_or_checkpoint(honest: Made) -> None:
    pixels, c = honest["fixed"]
    brighter = pixels.copy()
    brighter[0, 0, 0] += 1
    for other in (brighter, image(139), pixels.transpose(1, 0, 2).copy(), np.zeros((8, 8, 3), np.uint8)):
        report = check(c, other)
        assert isinstance(report.error, MismatchError)
        assert lines(report)["fresh votes"] == "not checked"
    for changes in ({"name": "another"}, {"sigma": 0.5}, {"resize": 5}, {"classes": ("a", "b", "c", "d")}):
        report = verify(c, pixels, config(**changes), secret=SECRET)
        assert isinstance(report.error, MismatchError), changes
        assert failed(report) == {"model.digest"}
        assert lines(report)["label"] == "not checked"
        assert lines(report)["mac"] == "holds"


def test_another_secret(honest: Made, voters: dict[str, Voter]) -> None:
    pixels, c = honest["fixed"]
    report = check(c, pixels, voters, secret=OTHER)
    assert failed(report) == {"mac", "votes counted again"}
    assert isinstance(report.error, InconsistentError)


def test_another_engine_cannot_be_held_to_the_same_votes(honest: Made, g: SmoothedClassifier) -> None:
    pixels, c = honest["fixed"]
    with brightness(batch=100) as other:
        assert other.engine != c.engine
        report = verify(c, pixels, config(), secret=SECRET, voter=lambda kind: other, votes=1000)
    assert report.error is None
    found = {f.check: f for f in report.findings}
    assert found["votes counted again"].outcome == "not checked"
    assert "identical votes cannot be demanded" in found["votes counted again"].words
    assert found["fresh votes"].outcome == "holds"
    assert "by another engine" in found["fresh votes"].words
