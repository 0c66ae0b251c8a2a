"""A network that tells three classes by brightness: its checkpoint settings, images and voter."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cases import voter_of
from torch import Tensor, nn

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.voters.batched import BatchedVoter

SECRET, SIGMA = bytes(range(32)), 0.25


class Brightness(nn.Module):
    """Three classes by the mean of the lattice integers: split near the middle, unanimous far from it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 3)
        self.fc.load_state_dict(
            {"weight": torch.tensor([[-1.0], [0.0], [1.0]]), "bias": torch.tensor([-100.0, -100.2, -100.0])}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.round(x * 255.0).flatten(1).mean(1, keepdim=True) - 128.0)  # type: ignore[no-any-return]


def config(**changes: Any) -> CheckpointConfig:
    """Returns the settings of the network's checkpoint, with changed fields."""
    plain = CheckpointConfig(
        name="brightness", architecture="test", classes=("dark", "grey", "bright"), input_shape=(3, 4, 4),
        mean=(0.0,) * 3, std=(1.0,) * 3, sigma=SIGMA, resize=4, files={"model.safetensors": "sha256:" + 64 * "0"},
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def image(level: int) -> npt.NDArray[np.uint8]:
    """Random pixels around a level: bright from about 145, split at 128."""
    generator = np.random.default_rng(level)
    return (level + generator.integers(-20, 21, (4, 4, 3))).astype(np.uint8)


def brightness(**options: Any) -> BatchedVoter:
    """Returns a voter of the network."""
    plain: dict[str, Any] = {"batch": 300, "workers": 2, "precision": "fp32", "compile": False, "device": "cpu"}
    model = nn.Sequential(nn.Identity(), Brightness())
    return voter_of(model, input_shape=(3, 4, 4), sigma=SIGMA, **{**plain, **options})
