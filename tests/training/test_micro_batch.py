"""A batch in parts trains as a whole one does: the same gradients, and every image counted once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from small_runs import EXACT, RECIPES, digits, lenet, log_of
from torch import Tensor

from macer_serve.training.loop import LoopOptions, _Run
from macer_serve.training.recipe import Recipe
from macer_serve.training.run_state import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
Train = Callable[..., Result]


def one_update(chosen: Recipe, tmp_path: Path, micro_batch: int | None) -> tuple[_Run, list[Tensor]]:
    """A run after its first step, and what was passed through the network for it."""
    model, passed = lenet(), []
    images, labels = digits(model)
    model.register_forward_pre_hook(lambda model, x: passed.append(x[0].clone()) if model.training else None)
    run = _Run(model, chosen, LoopOptions(EXACT, micro_batch=micro_batch), RunFolder(tmp_path), seed=3)
    run.update(images, labels, 1.0, 0.1)
    return run, passed


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize(("micro_batch", "parts"), [(16, [16, 16, 8]), (39, [39, 1]), (7, [7, 7, 7, 7, 7, 5])])
def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(
    tmp_path: Path, method: str, micro_batch: int, parts: list[int]
) -> None:
    chosen = RECIPES[method]
    copies = chosen.to_json().get("k", 1)
    whole, passed_whole = one_update(chosen, tmp_path, None)
    divided, passed = one_update(chosen, tmp_path, micro_batch)
    assert [len(x) for x in passed] == [copies * part for part in parts], "with their copies, so many per pass"
    assert [len(x) for x in passed_whole] == [copies * 40]
    for one, other in zip(whole.model.parameters(), divided.model.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).abs().max() <= 1e-5 * one.grad.abs().max()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    # The same noise on the CPU; attacked images differ by rounding, as gradients do.
    torch.testing.assert_close(torch.cat(passed), passed_whole[0], rtol=0, atol=1e-3 if method == "smoothadv" else 0)


@pytest.mark.parametrize("method", RECIPES)
def test_metrics_count_every_image_once_however_a_batch_is_divided(tmp_path: Path, method: str) -> None:
    sums = {m: one_update(RECIPES[method], tmp_path, m)[0].sums for m in (None, 40, 99, 16, 7, 1)}
    values = {m: {name: value.item() for name, value in of.items()} for m, of in sums.items()}
    if method == "macer":
        assert 10 <= values[None]["inside"] <= values[None]["correct"] < 40
    for m in values:
        assert values[m] == pytest.approx(values[None], rel=1e-5)


def test_a_run_in_parts_ends_where_a_whole_one_does_and_says_so(mnist: Path, train: Train, tmp_path: Path) -> None:
    command = ("--dataset", "mnist", "--data-dir", mnist, "--epochs", 2, "--batch", 16, "--k", 2, "--lam", 1)
    weights, losses = [], []
    for name, how in (("whole", ()), ("parts", ("--micro-batch", 5))):
        result = train(*command, *how, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        weights.append(load_file(tmp_path / name / "model.safetensors"))
        losses.append([line["loss"] for line in log_of(tmp_path / name)])
        recorded = json.loads((tmp_path / name / "config.json").read_text())["recipe"]["micro_batch"]
        assert recorded == (5 if how else None)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)
