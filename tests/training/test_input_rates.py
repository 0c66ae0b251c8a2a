"""What a run says of its input: how many images per second it delivers, and how many the network takes."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from macer_serve.datasets import load_dataset
from macer_serve.training import data
from macer_serve.training.data import TreeBatches, default_loaders

CPU = torch.device("cpu")


@pytest.mark.parametrize(("pause", "limit"), [(0.2, "the network is the limit"), (0.0, "the input is the limit")])
def test_a_run_says_once_what_limits_it(tree: Path, monkeypatch: pytest.MonkeyPatch, pause: float, limit: str) -> None:
    monkeypatch.setattr(data, "_SKIPPED", 3)
    monkeypatch.setattr(data, "_MEASURED", 4)
    notes: list[str] = []
    batches = TreeBatches(
        load_dataset("imagenet", tree, "train"),
        size=16, batch=5, seed=0, device=CPU, loaders=0, limit=None, note=notes.append,
    )  # fmt: skip
    for epoch in range(4):
        for _ in batches.epoch(epoch, 0):
            time.sleep(pause)  # the network's step
    (note,) = notes
    found = re.match(r"the input delivers ([\d,]+) images/s .*, the network takes ([\d,]+) images/s: ", note)
    assert found, note
    assert limit in note
    if pause:
        assert int(found[2]) <= 5 / pause


def test_a_gpu_takes_all_cores_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "usable_cores", lambda: 16)
    assert [default_loaders(torch.device("cuda"), workers) for workers in (1, 8, 100)] == [16, 2, 1]
    assert [default_loaders(CPU, workers) for workers in (1, 8, 100)] == [2, 2, 1]
