"""The network as methods call it: single copies, and layers that draw random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from macer_serve.architectures import base_classifier
from macer_serve.training.loop import LoopOptions, _Run
from macer_serve.training.network import Group, Network
from macer_serve.training.precision import Precision
from macer_serve.training.recipes import recipe
from macer_serve.training.run_state import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = Precision(torch.device("cpu"), "fp32", False, 1)


def build(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return base_classifier(architecture, classes=3, input_shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)


def statistics(model: nn.Module) -> list[Tensor]:
    return [value.clone() for name, value in model.named_buffers() if "running" in name]


def test_a_single_copy_without_batch_statistics_is_normalised_by_the_running_ones() -> None:
    """At 32 pixels the last feature maps of a ResNet-18 are of one pixel: one copy has no variance there."""
    model = build("torchvision:resnet18")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.rand(1, 3, 32, 32))
    network, x = Network(model, EXACT, Group()), torch.rand(1, 3, 32, 32)
    before = statistics(model)
    logits = network(x)
    assert torch.equal(logits, model.eval()(x.contiguous(memory_format=torch.channels_last)))
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    model.train()
    network(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(module.training for module in model.modules())
    network(torch.rand(2, 3, 32, 32))
    assert not any(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True)), "two have statistics"


def test_a_single_copy_with_batch_statistics_is_normalised_by_its_own() -> None:
    model = build("resnet20")
    network, x = Network(model, EXACT, Group()), torch.rand(1, 3, 32, 32)
    logits = network(x)
    assert torch.equal(logits, model(x.contiguous(memory_format=torch.channels_last)))
    assert not torch.equal(logits, model.eval()(x))


def test_dropout_follows_from_the_seed_and_the_step(tmp_path: Path) -> None:
    """A run continues to the same weights, whatever else drew random numbers before."""
    chosen = recipe("folder", "gaussian", 0.25)
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])

    def weights_after_a_step(seed: int, drawn_before: int) -> dict[str, Tensor]:
        run = _Run(build("torchvision:squeezenet1_1"), chosen, LoopOptions(EXACT), RunFolder(tmp_path), seed)
        run.model.train()
        torch.manual_seed(drawn_before)
        run.update(images, labels, 1.0, 0.1)
        return run.model.state_dict()

    first, again, other = (weights_after_a_step(*seeds) for seeds in ((0, 1), (0, 2), (1, 1)))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())
