"""Honest certificates of every kind, made once for all tests of verification; no test changes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from brightness import SECRET, brightness, config, image
from checking import FIXED, SOFT, Made

from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import Task, Voter, drive


def capped(g: SmoothedClassifier, pixels: Any, plan: Plan, cap: int) -> Certificate:
    question = g.question(pixels)
    run = g.certification(question, plan, cap=cap)
    assert g.voter is not None
    drive(run, question.x, question.seed, g.voter)
    return g.certificate(question, run, g.voter.engine)


def interrupted(g: SmoothedClassifier, pixels: Any, plan: Plan, draws: int, *, deadline: bool = True) -> Certificate:
    """What is proved after so many draws of at most 300 copies."""
    question = g.question(pixels)
    run = g.certification(question, plan)
    assert g.voter is not None
    for _ in range(draws):
        draw = run.wants(300)
        assert isinstance(draw, Draw)
        run.add(draw, g.voter.submit([Task(question.x, question.seed, draw)]).result()[0])
    if deadline:
        run.stop("deadline")
    return g.certificate(question, run, g.voter.engine)


PLANS: dict[str, tuple[int, Plan]] = {
    "fixed": (140, FIXED),
    "unanimous": (220, FIXED),
    "abstained": (128, FIXED),
    "predict": (140, Plan(n=500, mode="predict")),
    "predict abstained": (128, Plan(n=500, mode="predict")),
    "predict too few": (220, Plan(n=10, mode="predict")),
    "radius": (140, Plan(n0=50, n=20_000, radius=0.1)),
    "radius refuted": (140, Plan(n0=50, n=20_000, radius=0.9)),
    "radius at n": (140, Plan(n0=50, n=200, radius=0.25)),
    "tolerance": (140, Plan(n0=50, n=20_000, tolerance=0.1)),
    "tolerance at n": (140, Plan(n0=50, n=500, tolerance=0.001)),
    "two-sided": (133, Plan(n0=50, n=2000, bound="two-sided")),
    "two-sided radius": (140, Plan(n0=50, n=20_000, bound="two-sided", radius=0.1)),
    "two-sided tolerance": (140, Plan(n0=50, n=20_000, bound="two-sided", tolerance=0.1)),
    "soft": (150, Plan(n0=50, n=2000, **SOFT)),
    "soft radius": (150, Plan(n0=50, n=5000, radius=0.05, **SOFT)),
    "soft tolerance": (150, Plan(n0=50, n=5000, tolerance=0.1, **SOFT)),
    "soft abstained": (128, Plan(n0=50, n=500, **SOFT)),
}


@pytest.fixture(scope="session")
def voters() -> Iterator[dict[str, Voter]]:
    with brightness() as exact, brightness(noise="gaussian") as gaussian:
        yield {"exact": exact, "gaussian": gaussian}


@pytest.fixture(scope="session")
def g(voters: dict[str, Voter]) -> SmoothedClassifier:
    return SmoothedClassifier(config(), voter=voters["exact"], secret=SECRET)


@pytest.fixture(scope="session")
def honest(g: SmoothedClassifier) -> Made:
    """Honest certificates of every kind, with their images."""
    made = Made({name: (image(level), g.certify(image(level), plan)) for name, (level, plan) in PLANS.items()})
    pixels = image(140)
    tolerance = Plan(n0=50, n=20_000, tolerance=0.001)
    made |= {
        "fixed capped": (pixels, capped(g, pixels, FIXED, 500)),
        "tolerance capped": (pixels, capped(g, pixels, tolerance, 517)),
        "predict capped": (pixels, capped(g, pixels, Plan(n=500, mode="predict"), 100)),
        "fixed deadline": (pixels, interrupted(g, pixels, FIXED, 3)),
        "deadline in the selection": (pixels, interrupted(g, pixels, dataclasses.replace(FIXED, n0=500), 1)),
        "deadline at once": (pixels, interrupted(g, pixels, tolerance, 0)),
        "tolerance deadline": (pixels, interrupted(g, pixels, tolerance, 20)),
        "tolerance running": (pixels, interrupted(g, pixels, tolerance, 20, deadline=False)),
        "predict deadline": (pixels, interrupted(g, pixels, Plan(n=500, mode="predict"), 1)),
    }
    large = np.random.default_rng(0).integers(130, 190, (11, 9, 3)).astype(np.uint8)  # resized: off the lattice
    made["resized"] = (large, g.certify(large, FIXED))
    return made
