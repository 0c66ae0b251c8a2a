"""The average is the exponential moving one of every step's weights, wherever the run is interrupted."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from small_runs import CPU, EXACT, QUICK, RECIPES, digits, lenet, residual, small_images
from torch import nn

from macer_serve.errors import InterruptedRunError
from macer_serve.training.data import DeviceBatches
from macer_serve.training.loop import LoopOptions, _Run, train
from macer_serve.training.recipes import recipe
from macer_serve.training.run_state import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
Train = Callable[..., Result]
Weights = dict[str, npt.NDArray[np.float64]]


def averaged_run(
    folder: Path, ema: float, progress: Callable[[nn.Sequential, int, int], None] = lambda model, epoch, step: None
) -> nn.Sequential:
    """The exported model of two epochs of four steps, the last with fewer images. `progress` sees every step."""
    model = residual()
    options = {"epochs": 2, "batch": 16, "lr": 0.05, "milestones": (), "ema": ema}
    chosen = recipe("cifar10", "gaussian", 0.25).with_options(**options)
    loop = LoopOptions(EXACT, save_every=2, progress=lambda epoch, step, steps, metrics: progress(model, epoch, step))
    batches = DeviceBatches(small_images(60), batch=16, seed=0, device=CPU, limit=None)
    return train(model, batches, chosen, seed=0, options=loop, folder=RunFolder(folder), identity={})


def test_the_average_is_the_exponential_moving_one_of_every_steps_weights(tmp_path: Path) -> None:
    """w_1, then d a + (1 - d) w: batch normalisation's statistics, too."""
    steps: list[Weights] = []

    def record(model: nn.Sequential, epoch: int, step: int) -> None:
        steps.append({name: value.double().numpy().copy() for name, value in model.state_dict().items()})

    exported = averaged_run(tmp_path, 0.8, record).state_dict()
    assert len(steps) == 8
    assert any("running_var" in name for name in exported)
    for name, value in exported.items():
        average = steps[0][name]
        for weights in steps[1:]:
            average = 0.8 * average + 0.2 * weights[name]
        if "num_batches_tracked" in name:
            assert value.item() == 8, "a count is not averaged"
        else:
            np.testing.assert_allclose(value.numpy(), average, rtol=1e-5, atol=1e-6)
            assert np.abs(average - steps[-1][name]).max() > 1e-4, "not the weights themselves"


def test_the_average_of_one_step_is_its_weights(tmp_path: Path) -> None:
    """Nothing of the initial weights is left in it."""
    model = lenet()
    images, labels = digits(model)
    run = _Run(model, RECIPES["gaussian"].with_options(ema=0.99), LoopOptions(EXACT), RunFolder(tmp_path), seed=0)
    run.update(images, labels, 1.0, 0.1)
    assert run.exported is not run.model
    for name, value in run.exported.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name])


@pytest.mark.parametrize("way", ["stopped", "lost"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_average_interrupted_within_an_epoch_continues_bit_for_bit(tmp_path: Path, way: str, epoch: int) -> None:
    """Stopped by SIGTERM after the third step, or lost there, after the second was saved."""

    def interrupt(model: nn.Sequential, at: int, step: int) -> None:
        if (at, step) == (epoch, 3):
            if way == "lost":
                raise ConnectionError
            os.kill(os.getpid(), signal.SIGTERM)

    expected = averaged_run(tmp_path / "undisturbed", 0.8)
    with pytest.raises(ConnectionError if way == "lost" else InterruptedRunError):
        averaged_run(tmp_path / "disturbed", 0.8, interrupt)
    saved = torch.load(RunFolder(tmp_path / "disturbed").states()[-1], weights_only=True)
    assert (saved["epoch"], saved["step"]) == (epoch, 2 if way == "lost" else 3)
    continued = averaged_run(tmp_path / "disturbed", 0.8)
    for name, value in expected.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value)
    states = [torch.load(RunFolder(tmp_path / n).states()[-1], weights_only=True) for n in ("undisturbed", "disturbed")]
    for part in ("model", "average"):
        for name, value in states[0][part].items():
            assert torch.equal(states[1][part][name], value)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_checkpoint_holds_the_average_or_the_weights(mnist: Path, train: Train, tmp_path: Path, ema: float) -> None:
    result = train(*QUICK, "--data-dir", mnist, "--ema", ema, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    exported = load_file(tmp_path / "out" / "model.safetensors")
    state = torch.load(RunFolder(tmp_path / "out.run").states()[-1], weights_only=True)
    assert all(torch.equal(state["average" if ema else "model"][name], value) for name, value in exported.items())
    assert any(not torch.equal(state["model"][name], value) for name, value in exported.items()) == bool(ema)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["recipe"]["ema"] == ema
