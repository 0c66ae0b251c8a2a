"""The shares of a batch are the batch, and there are no more workers than cores."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from macer_serve.training.data import DeviceBatches, TreeBatches
from macer_serve.training.network import Group

Start = Callable[..., "subprocess.Popen[str]"]
QUICK = ("--dataset", "mnist", "--method", "gaussian", "--batch", 64, "--compile", "off", "--precision", "fp32")


def test_shares_of_a_batch_are_the_batch(tree: Path, mnist: Path) -> None:
    """Pixel for pixel, a last batch of one image included; a worker without any takes one with a share of 0."""
    from macer_serve.datasets import load_dataset

    cpu = torch.device("cpu")

    def of(group: Group, dataset: str) -> DeviceBatches | TreeBatches:
        if dataset == "mnist":
            images = load_dataset("mnist", mnist, "train")
            return DeviceBatches(images, batch=13, seed=0, device=cpu, limit=None, group=group)
        images = load_dataset("imagenet", tree, "train")
        return TreeBatches(images, size=16, batch=7, seed=0, device=cpu, loaders=0, limit=None, group=group)

    for dataset in ("mnist", "imagenet"):
        whole = list(of(Group(), dataset).epoch(1, 0))
        assert len(whole[-1][1]) == 1
        shares = [list(of(Group(rank, 2), dataset).epoch(1, 0)) for rank in (0, 1)]
        for (images, labels, all_of_it), first, second in zip(whole, *shares, strict=True):
            assert all_of_it == 1.0
            assert first[2] + second[2] == pytest.approx(1.0)
            assert torch.equal(images[0::2], first[0])
            assert torch.equal(labels[0::2], first[1])
            if len(labels) > 1:
                assert torch.equal(images[1::2], second[0])
                assert torch.equal(labels[1::2], second[1])
            else:
                assert (second[2], len(second[1])) == (0.0, 1)


def test_more_workers_than_cores_are_refused_at_once(long_mnist: Path, start: Start, tmp_path: Path) -> None:
    run = start(*QUICK, "--data-dir", long_mnist, "--workers", 1000, "--out", tmp_path / "out")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 2, output
    assert "1000 workers need one each" in output
    assert "Traceback" not in output
