"""A large loss ends a run, but not during its first steps: from random weights they may overshoot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import CPU, EXACT, RECIPES, residual, small_images

from macer_serve.errors import TrainingError
from macer_serve.training.data import DeviceBatches
from macer_serve.training.loop import LoopOptions, train
from macer_serve.training.run_state import RunFolder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("images", "epochs", "ends_in"),
    [(8, 1, 1), (8, 3, 3), (40, 3, 3), (60, 3, 2), (60, 9, 2), (99, 5, 2), (100, 5, 1), (140, 2, 1)],
)
def test_a_large_loss_is_judged_after_a_hundred_steps_or_at_the_end(
    tmp_path: Path, images: int, epochs: int, ends_in: int
) -> None:
    chosen = RECIPES["gaussian"].with_options(epochs=epochs, batch=1)
    batches = DeviceBatches(small_images(images), batch=1, seed=0, device=CPU, limit=None)
    loop = LoopOptions(EXACT, most_loss=1e-9)  # any loss is large
    with pytest.raises(TrainingError, match=f"the loss rose to .* in epoch {ends_in}"):
        train(residual(), batches, chosen, seed=0, options=loop, folder=RunFolder(tmp_path), identity={})
    log = tmp_path / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    assert [json.loads(line)["epoch"] for line in lines] == list(range(ends_in - 1))
