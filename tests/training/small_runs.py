"""Small networks, images and recipes, and what runs of them leave behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from macer_serve.architectures import base_classifier
from macer_serve.datasets import DATASETS, ImageSet
from macer_serve.training.precision import Precision
from macer_serve.training.recipes import recipe
from macer_serve.training.run_state import RunFolder

CPU = torch.device("cpu")
EXACT = Precision(CPU, "fp32", False, 1)
RECIPES = {
    "gaussian": recipe("mnist", "gaussian", 0.5),
    "macer": recipe("mnist", "macer", 0.5).with_options(k=3, lam=4.0, defer=0),
    "smoothadv": recipe("mnist", "smoothadv", 0.5).with_options(k=2, attack_steps=3, epsilon=1.0, ramp=0),
}
# 40 images: three steps an epoch.
QUICK = ("--dataset", "mnist", "--method", "gaussian", "--epochs", 2, "--batch", 16, "--lr", 0.1)


def log_of(out: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's log, one per epoch."""
    return RunFolder(out.with_name(out.name + ".run")).entries()


def states_of(out: Path) -> list[tuple[int, int]]:
    """Epochs and steps of the states that are kept."""
    paths = out.with_name(out.name + ".run").glob("state-*")
    return sorted((int(path.stem.split("-")[1]), int(path.stem.split("-")[2])) for path in paths)


def state_path(out: Path, epoch: int, step: int) -> Path:
    return out.with_name(out.name + ".run") / f"state-{epoch:08d}-{step:08d}.pt"


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return base_classifier("lenet", classes=10, input_shape=(1, 28, 28), mean=(0.5,), std=(0.5,))


def digits(model: nn.Module, count: int = 40) -> tuple[Tensor, Tensor]:
    """Random images, and labels of which the network has half right."""
    images = torch.rand((count, 1, 28, 28), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(images).argmax(1)
    return images, torch.where(torch.arange(count) % 2 == 0, labels, (labels + 1) % 10)


def small_images(count: int) -> ImageSet:
    """Random images of 8x8 pixels."""

    class Source(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.data)

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    source = Source(data=pixels, targets=generator.integers(0, 10, count).tolist())
    return ImageSet(DATASETS["cifar10"], source, tuple("0123456789"))


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    info = DATASETS["cifar10"]
    return base_classifier("resnet20", classes=10, input_shape=(3, 8, 8), mean=info.mean, std=info.std)
