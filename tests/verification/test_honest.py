"""Honest certificates of every kind hold, and what cannot be checked is not said to hold."""

from __future__ import annotations

import dataclasses
from typing import Any

from brightness import SECRET, config, image
from checking import FIXED, Made, check, failed, lines

from macer_serve.smoothed import SmoothedClassifier
from macer_serve.verification import verify
from macer_serve.voters import Voter


def test_honest_certificates_hold(honest: Made, voters: dict[str, Voter]) -> None:
    ended = set()
    for name, (pixels, c) in honest.items():
        report = check(c, pixels, voters, secret=SECRET)
        assert report.error is None, (name, report.failed)
        assert set(lines(report).values()) == {"holds"}, name
        assert lines(report)["votes counted again"] == "holds"
        assert lines(report)["mac"] == "holds"
        ended.add((c.plan["mode"], c.plan["kind"], c.stopped, c.abstained))
    assert {stopped for *_, stopped, _ in ended} == {"n", "cap", "deadline", "radius", "futility", "tolerance", None}
    assert ("certify", "tolerance", "deadline", False) in ended  # proved something, though interrupted
    assert ("predict", "fixed", "n", False) in ended


def test_without_the_secret_fresh_votes_do_not_contradict_them(honest: Made, voters: dict[str, Voter]) -> None:
    """One seed each: a false alarm has probability at most 0.001 a certificate, 0.03 in all."""
    tested = 0
    for name, (pixels, c) in honest.items():
        report = check(c, pixels, voters, votes=3000)
        assert report.error is None, (name, report.failed)
        found = lines(report)
        assert found["mac"] == found["votes counted again"] == "not checked"
        tested += found["fresh votes"] == "holds"
        assert "mac" in report.verdict
    assert tested > 18


def test_plain_noise(voters: dict[str, Voter]) -> None:
    g = SmoothedClassifier(config(), voter=voters["gaussian"], noise="gaussian", secret=SECRET)
    c = g.certify(image(140), FIXED)
    report = check(c, image(140), voters, secret=SECRET)
    assert report.error is None
    assert any("floating-point error" in f.words for f in report.findings if f.check == "noise")


def test_no_votes_are_drawn_where_none_are_wanted(honest: Made) -> None:
    def refuse(kind: str) -> Voter:
        raise AssertionError("a network was warmed up")

    pixels, c = honest["fixed"]
    assert verify(c, pixels, config(), voter=refuse, votes=0).error is None
    assert verify(c, image(90), config(), voter=refuse).error is not None
    assert lines(verify(c, pixels, config()))["fresh votes"] == "not checked"


def test_a_record_from_javascript_holds(honest: Made, voters: dict[str, Voter]) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return int(value) if isinstance(value, float) and value.is_integer() else value

    for name in ("abstained", "fixed"):
        pixels, c = honest[name]
        assert set(lines(check(plain(c.to_json()), pixels, voters, secret=SECRET)).values()) == {"holds"}


def test_last_digits_may_be_those_of_another_library_and_no_more(honest: Made) -> None:
    pixels, c = honest["two-sided tolerance"]
    near = dataclasses.replace(c, p_lower=c.p_lower * (1 - 1e-14), p_upper=c.p_upper * (1 + 1e-14))
    assert verify(near, pixels, config()).error is None
    far = dataclasses.replace(c, p_lower=c.p_lower + 1e-8)
    assert failed(verify(far, pixels, config())) == {"p_lower"}
