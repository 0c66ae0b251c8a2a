"""A small digit network with its checkpoint settings, changes to `config.json`, and a pickle that executes code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from brightness import config
from torch import nn

from macer_serve.architectures import base_classifier
from macer_serve.checkpoint import CheckpointConfig

DIGEST = "sha256:" + 64 * "0"


def lenet() -> tuple[nn.Sequential, CheckpointConfig]:
    """Returns a network for digits and the settings to save it with."""
    torch.manual_seed(1)
    shape = (1, 28, 28)
    classes = tuple("0123456789")
    settings = config(
        name="digits", architecture="lenet", classes=classes, input_shape=shape, mean=(0.1307,), std=(0.3081,),
        resize=28, dataset="mnist", seed=7, recipe={"method": "gaussian", "lr": 0.01}, metrics={"loss": 0.25},
        versions={"torch": torch.__version__},
    )  # fmt: skip
    return base_classifier("lenet", classes=10, input_shape=shape, mean=(0.1307,), std=(0.3081,)).eval(), settings


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "executed")


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; `...` removes one."""
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
