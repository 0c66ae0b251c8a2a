"""The certified curve of a model in training, on held-out images."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from macer_serve.base_classifier import BaseClassifier
from macer_serve.checkpoint import CheckpointConfig
from macer_serve.datasets import ImageSet
from macer_serve.evaluation.certify import certified_row, spread_indices
from macer_serve.evaluation.logs import Log, Row
from macer_serve.evaluation.summaries import summary
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.training.precision import Precision
from macer_serve.voters import VoterOptions, open_voter
from macer_serve.voters.options import Device

# Enough votes to see a run go wrong, in seconds. `macer certify` is for figures.
PLAN = Plan(n=1000)
_SEEDS = EvaluationSeed.named("macer train: held-out images")


def certified_curve(
    model: nn.Module,
    config: CheckpointConfig,
    images: ImageSet,
    count: int,
    precision: Precision,
    *,
    progress: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Returns ACR, abstentions and certified accuracy by radius of `count` evenly spread images, by `PLAN`.

    Every call takes the same images and the same noise. The model is left as it was.
    """
    began = time.monotonic()
    indices = spread_indices(len(images), count)
    voter = open_voter(
        BaseClassifier.of_module(model, input_shape=config.input_shape, classes=len(config.classes)),
        sigma=config.sigma,
        options=VoterOptions(
            engine="torch",
            device=cast(Device, precision.device.type),
            precision="bf16" if precision.bf16 else "fp32",
            compile=precision.compiled,
        ),
    )
    try:
        classifier = SmoothedClassifier(config, voter=voter, issuer=_SEEDS)
        rows = []
        for idx in indices:
            rows.append(certified_row(classifier, images, idx, PLAN))
            progress(rows[-1])
    finally:
        voter.close()
        precision.apply()  # a voter sets torch to one thread per core
    figures = summary(Log(tuple(rows)))
    return {
        "images": figures.image_set,
        "n": PLAN.n,
        "alpha": PLAN.alpha,
        "acr": figures.acr,
        "acr_error": figures.acr_error,
        "abstained": figures.abstained,
        "certified": {str(at.radius): at.accuracy for at in figures.certified},
        "seconds": round(time.monotonic() - began, 3),
    }
