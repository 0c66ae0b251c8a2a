"""Certificates whose classes are grouped, made of random votes."""

from __future__ import annotations

import numpy as np
from brightness import config, image, issuer

from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.certification import Done, Draw
from macer_serve.smoothing.hierarchy import Hierarchy
from macer_serve.smoothing.plan import Plan

HIERARCHY = Hierarchy.from_json({"dim": ["dark", "grey"], "light": ["bright"]}, ("dark", "grey", "bright"))
OTHER = Hierarchy.from_json({"plain": ["grey"], "strong": ["dark", "bright"]}, ("dark", "grey", "bright"))
CONFIG = config(hierarchy=HIERARCHY)
CLASSIFIER = SmoothedClassifier(CONFIG, issuer=issuer())
IMAGE = image(130)
PLANS = [
    Plan(n=500, bound=bound, **stop)
    for bound in ("one-sided", "two-sided")
    for stop in ({}, {"radius": 0.05}, {"tolerance": 0.05})
]


def certificate(plan: Plan, law: tuple[float, ...] = (0.47, 0.47, 0.06)) -> Certificate:
    model_input, dice = CLASSIFIER.model_input(IMAGE), np.random.default_rng(3)
    run = CLASSIFIER.certification(model_input, plan)
    while not isinstance(want := run.wants(), Done):
        assert isinstance(want, Draw)
        run.add(want, np.bincount(dice.choice(3, len(want), p=law), minlength=3))
    proof = CLASSIFIER.seed_proof(model_input, plan)
    return CLASSIFIER.certificate(model_input, run, proof, "torch-cpu-fp32-b256:0123456789abcdef")
