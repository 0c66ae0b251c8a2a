"""Inventions that are consistent are found out by the secret, by the votes or by fresh votes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from brightness import SECRET, SIGMA, config, image
from checking import FIXED, OTHER, SOFT, check, failed

from macer_serve.errors import ContradictedError, InconsistentError
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.certification import Certification, Done
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import SOFT_LEVELS, Draw, Votes
from macer_serve.voters import Voter


def forged(
    plan: Plan, votes: Any, selection: Any, pixels: Any, engine: str, secret: bytes | None = OTHER
) -> Certificate:
    """A record that follows from invented votes, under the forger's own mac, or none."""
    forger = SmoothedClassifier(config(), secret=secret)
    question = forger.question(pixels)
    run = Certification(plan, classes=3, sigma=SIGMA, tau=forger.noise.tau(question.x))
    invented = {"selection": np.array(selection), "estimation": np.array(votes)}
    while not isinstance(want := run.wants(), Done):
        assert isinstance(want, Draw)
        run.add(want, invented[want.purpose])
    made = forger.certificate(question, run, engine)
    return made if secret else dataclasses.replace(made, mac=None)


def histogram(n: int, *levels: int) -> Votes:
    votes = np.zeros((3, SOFT_LEVELS), np.int64)
    votes[range(3), levels] = n
    return votes


FORGERIES: dict[str, tuple[int, Plan, Any, Any]] = {
    "one-sided": (140, FIXED, [0, 0, 2000], [0, 0, 50]),
    "certifies an abstention": (128, FIXED, [200, 0, 1800], [0, 0, 50]),
    "another class": (140, FIXED, [1900, 0, 100], [50, 0, 0]),
    "two-sided, p_A": (133, Plan(n0=50, n=2000, bound="two-sided"), [0, 0, 2000], [0, 0, 50]),
    # p_A is as it should be, the runner-up's votes went to a class that nobody would test
    "two-sided, p_B": (133, Plan(n0=50, n=2000, bound="two-sided"), [240, 400, 1360], [0, 0, 50]),
    "soft, p_A": (150, Plan(n0=50, n=2000, **SOFT), histogram(2000, 10, 10, 1000), histogram(50, 0, 0, 1023)),
    "soft, p_B": (150, Plan(n0=50, n=2000, **SOFT), histogram(2000, 0, 0, 550), histogram(50, 0, 0, 1023)),
    "predict": (128 - 12, Plan(n=500, mode="predict"), [100, 0, 400], [0, 0, 0]),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_consistent_forgeries(kind: str, voters: dict[str, Voter]) -> None:
    level, plan, votes, selection = FORGERIES[kind]
    pixels = image(level)
    for secret in (OTHER, SECRET):  # SECRET: an issuer who lies
        c = forged(plan, votes, selection, pixels, voters["exact"].engine, secret)
        assert not c.abstained
        assert check(c, pixels).error is None  # it follows from itself
        report = check(c, pixels, voters, secret=SECRET)
        assert failed(report) == {"votes counted again"} | ({"mac"} if secret == OTHER else set())
        assert isinstance(report.error, InconsistentError)
    report = check(dataclasses.replace(c, mac=None), pixels, voters, secret=SECRET)
    assert failed(report) == {"mac", "votes counted again"}
    report = check(c, pixels, voters)
    assert failed(report) == {"fresh votes"}
    assert isinstance(report.error, ContradictedError)
    (words,) = [f.words for f in report.failed]
    p = "p_B <= " if kind.endswith("p_B") else "p_A >= "
    assert p in words


def test_a_small_overclaim_needs_the_secret(voters: dict[str, Voter], g: SmoothedClassifier) -> None:
    pixels = image(140)
    votes = list(g.certify(pixels, FIXED).votes)
    c = forged(FIXED, [votes[0] - 5, votes[1], votes[2] + 5], [0, 0, 50], pixels, voters["exact"].engine)
    assert check(c, pixels, voters).error is None
    assert check(c, pixels, voters, secret=SECRET).error is not None
