"""A fixed log is Cohen's: CERTIFY (Cohen et al. 2019, Algorithm 1) written out straight, on the same noisy copies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from macer_serve.checkpoint import load_model
from macer_serve.datasets import ImageSet, dataset_info
from macer_serve.evaluation.certify import rows_of, write_rows
from macer_serve.evaluation.logs import LogWriter, read_log
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import ModelInput, SmoothedClassifier
from macer_serve.smoothing.noise import NoiseKind
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions

N0, N, ALPHA = 50, 600, 0.001
PLAN = Plan(n0=N0, n=N, alpha=ALPHA)
IMAGES = sorted((Path(__file__).parent / "images").glob("*.png"))[:5]


def counts(g: SmoothedClassifier, model_input: ModelInput, purpose: str, n: int) -> np.ndarray:
    """Class counts of n noisy copies, by the plain network in fp32: no voter, no batching, no state machine."""
    _, model = load_model("bundled:cifar10")
    copies = g.noise.sample(model_input.x, g.seed_proof(model_input, PLAN).seed, purpose, 0, n)  # type: ignore[arg-type]
    with torch.inference_mode():
        x = torch.from_numpy(copies).float().mul(g.noise.scale).permute(0, 3, 1, 2)
        return np.bincount(model.eval()(x).argmax(1).numpy(), minlength=10)


def cohen(first: np.ndarray, votes: np.ndarray, sigma: float, tau: float) -> tuple[int, float]:
    """Algorithm 1: the class and the radius, or -1 and 0."""
    top = int(first.argmax())
    p_lower = proportion_confint(votes[top], votes.sum(), alpha=2 * ALPHA, method="beta")[0] - tau
    return (top, sigma * norm.ppf(p_lower)) if p_lower > 0.5 else (-1, 0.0)


@pytest.mark.parametrize("noise", ["gaussian", "exact"])
def test_a_fixed_log_is_cohens(noise: NoiseKind, tmp_path: Path) -> None:
    pixels = [(np.array(Image.open(path).convert("RGB")), i) for i, path in enumerate(IMAGES)]
    g = SmoothedClassifier.load(
        "bundled:cifar10",
        noise=noise,
        issuer=EvaluationSeed(bytes(32)),
        options=VoterOptions(precision="fp32", workers=1, compile=False),
    )
    images = ImageSet(dataset_info("cifar10"), pixels, g.config.classes)  # type: ignore[arg-type]
    with LogWriter.open(tmp_path / "log.tsv", {"noise": noise}) as log:
        write_rows(rows_of(g, images, PLAN), range(len(IMAGES)), log)
    certified = 0
    for row in read_log(tmp_path / "log.tsv").rows:
        model_input = g.model_input(pixels[row.idx][0])
        tau = g.noise.tau(model_input.x)
        assert (tau > 0) == (noise == "exact")
        votes = [counts(g, model_input, purpose, n) for purpose, n in (("selection", N0), ("estimation", N))]
        predict, radius = cohen(*votes, g.config.sigma, tau)
        assert row.predict == predict
        assert row.radius == max(0.0, math.floor((radius - 1e-9) * 1e6) / 1e6)
        certified += predict >= 0
    assert certified >= 3
