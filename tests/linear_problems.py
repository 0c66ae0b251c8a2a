"""Linear base classifiers whose true radii are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from cases import voter_of
from scipy.special import ndtri
from torch import Tensor, nn

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.plan import Plan

SIGMA = 0.25
FALSE_ALARM = 1e-6
ANYWHERE, CONFIDENT = (0.6, 0.8, 0.97), (0.993, 0.995, 0.997)  # shares of votes near which the test is sharpest
Integers = npt.NDArray[np.int64]


class Threshold(nn.Module):
    """[w.z >= t] of the lattice integers z = 255 x; every partial sum in fp32 is a multiple of 1/2 below 2^23."""

    def __init__(self, weights: Integers, t: int) -> None:
        super().__init__()
        w = torch.from_numpy(weights.transpose(2, 0, 1).reshape(1, -1).copy()).float()
        self.fc = nn.Linear(w.shape[1], 2)
        self.fc.load_state_dict(
            {"weight": torch.cat([torch.zeros_like(w), w]), "bias": torch.tensor([0.0, 0.5 - float(t)])}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.round(x * 255.0).flatten(1))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Problem:
    """A linear base classifier with its truth. `weights` [H, W, C]; one channel means uploads are averaged to grey."""

    weights: Integers
    t: int
    g: int

    @classmethod
    def of(cls, shape: tuple[int, int, int], g: int = 1, seed: int = 0) -> Problem:
        generator = np.random.default_rng(seed)
        w = generator.integers(1, 5, shape) * generator.choice([-1, 1], shape)
        w.reshape(-1)[:2] = [1, -1]  # gcd 1, and a coordinate to reach every sum with
        return cls(g * w, int(g * w.sum() * 128 + g * 7), g)

    @property
    def grey(self) -> bool:
        return self.weights.shape[2] == 1

    @property
    def norm(self) -> float:
        return math.sqrt(float((self.weights**2).sum()))

    def upload_weights(self) -> Integers:
        """Of the three channels of the upload, in units of 1/3 where they are averaged: [H, W, 3]."""
        return np.repeat(self.weights, 3, axis=2) if self.grey else self.weights

    def image(self, margin: float, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
        """A random upload whose model input x has w.x - (t - g/2) = `margin`, or as near it as sums come."""
        w, unit = self.upload_weights(), 3 if self.grey else 1
        target = unit * (self.t - self.g / 2 + margin)
        total = self.g * round(target / self.g)
        while True:
            u = generator.integers(40, 216, w.shape)
            for _ in range(4):
                u += np.rint((total - (w * u).sum()) * w / (w**2).sum()).astype(np.int64)
            u[0, 0, 0] += (total - (w * u).sum()) // w[0, 0, 0]
            if u.min() >= 0 and u.max() <= 255:
                assert (w * u).sum() == total
                return u.astype(np.uint8)

    def truth(self, u: npt.NDArray[np.uint8]) -> tuple[int, float, float]:
        """The smoothed class, and R* at the model input and at the upload."""
        unit = 3 if self.grey else 1
        margin = float((self.upload_weights() * u.astype(np.int64)).sum()) / unit - (self.t - self.g / 2)
        at_input = abs(margin) / (255 * self.norm)
        return int(margin > 0), at_input, at_input * (math.sqrt(3) if self.grey else 1.0)

    def classifier(self, batch: int, engine: str = "torch") -> Iterator[SmoothedClassifier]:
        height, width, channels = self.weights.shape
        config = CheckpointConfig(
            name="linear", architecture="test", classes=("below", "above"), input_shape=(channels, height, width),
            mean=(0.0,) * channels, std=(1.0,) * channels, sigma=SIGMA, resize=height,
            files={"model.safetensors": "sha256:" + 64 * "0"},
        )  # fmt: skip
        with voter_of(
            nn.Sequential(nn.Identity(), Threshold(self.weights, self.t)),
            input_shape=config.input_shape,
            sigma=SIGMA,
            engine=engine,
            batch=batch,
            workers=1,
            precision="fp32",
            compile=False,
        ) as voter:
            yield SmoothedClassifier(config, voter=voter, secret=bytes(range(32)))


COLOUR = Problem.of((4, 4, 3))
GCD3 = Problem.of((4, 4, 3), g=3, seed=1)
GREY = Problem.of((4, 4, 1), seed=2)


def margins(problem: Problem, plan: Plan, shares: tuple[float, ...]) -> list[float]:
    """Where a bound is most easily caught: R* just below the radius that k successes prove, k near share * n.

    There the false probability is alpha itself, but for the steps of the lattice. On both sides of the boundary;
    and on the boundary's two sides themselves, as near as integers come, where either class may be selected.
    """
    half, found = problem.g / 2, [problem.g / 2]
    for share in shares:
        radius = SIGMA * float(ndtri(clopper_pearson_lower(round(share * plan.n), plan.n, plan.alpha)))
        steps = math.floor((radius * 255 * problem.norm - half) / problem.g)
        found.append(problem.g * max(0, steps) + half)
    return [side * margin for margin in found for side in (1, -1)]
