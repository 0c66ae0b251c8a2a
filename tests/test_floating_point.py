"""Noise added in floating point leaves residue by which a base classifier can know the clean image; exact noise, none.

After Voracek & Hein, "Sound randomized smoothing in floating-point arithmetic" (ICLR 2023): the certificate of the
plain Gaussian is false, by far, although every one of its formulas is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cases import voter_of
from torch import Tensor, nn

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.noise import NoiseKind
from macer_serve.smoothing.plan import Plan

SHAPE, SIGMA = (3, 32, 32), 0.25
BLACK, NEARLY = np.zeros((32, 32, 3), np.uint8), np.ones((32, 32, 3), np.uint8)
DISTANCE = math.sqrt(3072) / 255  # 0.217 between the two, in pixel values in [0, 1]


class Residue(nn.Module):
    """Sees by the last bits whether a black pixel lies under the noise.

    x = 0: x + eps is eps itself, and a small eps has 24 significant bits of its own. x = 1/255: a sum below 2^-9 is
    left by cancellation of terms above 2^-9, hence a multiple of 2^-32, exactly. So small values that are no such
    multiple occur in the first case, some 14 in an image of 3,072 at sigma = 0.25, and never in the second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2)
        self.fc.load_state_dict({"weight": torch.tensor([[1.0], [-1.0]]), "bias": torch.tensor([-0.5, 0.5])})

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * 2.0**32
        fine = (x.abs() < 2.0**-9) & (scaled != torch.round(scaled))
        return self.fc(fine.flatten(1).any(1, keepdim=True).float())  # type: ignore[no-any-return]


CONFIG = CheckpointConfig(
    name="residue", architecture="test", classes=("black", "not black"), input_shape=SHAPE,
    mean=(0.0,) * 3, std=(1.0,) * 3, sigma=SIGMA, resize=32, files={"model.safetensors": "sha256:" + 64 * "0"},
)  # fmt: skip


def classifier(noise: NoiseKind) -> Iterator[SmoothedClassifier]:
    with voter_of(
        nn.Sequential(nn.Identity(), Residue()),
        input_shape=SHAPE,
        sigma=SIGMA,
        noise=noise,
        device="cpu",
        workers=1,
        precision="fp32",
        compile=False,
    ) as voter:
        yield SmoothedClassifier(CONFIG, voter=voter, noise=noise, issuer=EvaluationSeed(bytes(32)))


@pytest.fixture(scope="module")
def plain() -> Iterator[SmoothedClassifier]:
    yield from classifier("gaussian")


@pytest.fixture(scope="module")
def exact() -> Iterator[SmoothedClassifier]:
    yield from classifier("exact")


def contradict(a: Certificate, b: Certificate, distance: float) -> bool:
    """Whether two certificates cannot both be true: one ball holds the other's centre, of another class."""
    both = a.class_id is not None and b.class_id is not None
    return both and a.class_id != b.class_id and max(a.radius, b.radius) > distance


PLAN = Plan(n0=100, n=2000, alpha=0.001)


def test_plain_noise_certifies_a_falsehood(plain: SmoothedClassifier) -> None:
    at_black, nearby = plain.certify(BLACK, PLAN), plain.certify(NEARLY, PLAN)
    assert (at_black.label, nearby.label) == ("black", "not black")
    assert min(at_black.radius, nearby.radius) > 0.6 > 2.7 * DISTANCE
    assert contradict(at_black, nearby, DISTANCE)
    # Such certificates do not pretend otherwise.
    assert "up to floating-point error of the added noise" in at_black.statement
    assert at_black.noise == "gaussian/1"


def test_exact_noise_does_not(exact: SmoothedClassifier) -> None:
    at_black, nearby = exact.certify(BLACK, PLAN), exact.certify(NEARLY, PLAN)
    assert not contradict(at_black, nearby, DISTANCE)
    # The residue is gone: the same network sees the same thing under both, on every single copy.
    assert at_black.votes == nearby.votes == (0, PLAN.n)
    assert at_black.label == nearby.label == "not black"
    assert "floating-point" not in at_black.statement


@pytest.mark.parametrize("level", [1, 2, 3, 7, 64, 255])
def test_under_exact_noise_the_clean_image_cannot_be_told_from_its_neighbours(
    exact: SmoothedClassifier, level: int
) -> None:
    reference = exact.certify(BLACK, PLAN)
    other = exact.certify(np.full_like(BLACK, level), PLAN)
    assert not contradict(reference, other, level * DISTANCE)
