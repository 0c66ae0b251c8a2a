"""What tests of many rooms make: voters of plain torch modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from macer_serve.base_classifier import BaseClassifier
from macer_serve.smoothing.noise import NoiseKind
from macer_serve.voters import VoterOptions, open_voter
from macer_serve.voters.batched import BatchedVoter


def classifier_of(module: nn.Module, input_shape: tuple[int, int, int]) -> BaseClassifier:
    """Returns the base classifier of a module; its number of classes is read off its output."""
    with torch.inference_mode():
        classes = module.eval()(torch.zeros(2, *input_shape)).shape[1]
    return BaseClassifier.of_module(module, input_shape=input_shape, classes=classes)


def voter_of(
    module: nn.Module, *, input_shape: tuple[int, int, int], sigma: float, noise: NoiseKind = "exact", **options: Any
) -> BatchedVoter:
    """Returns a voter of a module, on the CPU, by torch unless `options` name another engine."""
    return open_voter(
        classifier_of(module, input_shape),
        sigma=sigma,
        noise=noise,
        options=VoterOptions(**{"engine": "torch", "device": "cpu", **options}),
    )
