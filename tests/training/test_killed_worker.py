"""Many workers train what one trains, and the loss of one costs what was not saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
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


def workers_below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray Train's workers that this run started."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "RayTrainWorker" in " ".join(child.cmdline())]


def test_a_killed_worker_costs_nothing_that_was_saved(long_mnist: Path, start: Start, tmp_path: Path) -> None:
    """kill -9 within the third epoch: the run ends at the weights of an undisturbed one, each epoch logged once."""
    options = (*QUICK, "--data-dir", long_mnist, "--epochs", 4, "--workers", 2, "--threads", 1, "--no-tensorboard")
    undisturbed = start(*options, "--out", tmp_path / "undisturbed")
    output, _ = undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0, output

    run = start(*options, "--save-every", 5, "--out", tmp_path / "killed")
    folder = tmp_path / "killed.run"
    while not [path for path in folder.glob("state-*.pt") if path.name > "state-00000002-00000000.pt"]:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    logged = (folder / "log.jsonl").read_text().splitlines()[:2]
    workers = workers_below(run)
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3]
    assert lines[:2] == logged, "what was saved was not done again"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("undisturbed", "killed")]
    assert weights[0] == weights[1]


def test_more_workers_than_cores_are_refused_at_once(long_mnist: Path, start: Start, tmp_path: Path) -> None:
    run = start(*QUICK, "--data-dir", long_mnist, "--workers", 1000, "--out", tmp_path / "out")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 2, output
    assert "1000 workers need one each" in output
    assert "Traceback" not in output
