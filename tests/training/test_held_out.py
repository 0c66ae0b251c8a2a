"""Curves on held-out images are what certification gives for the checkpoint, and training takes no notice of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import voter_of
from click.testing import Result
from torch import nn

from macer_serve.architectures import base_classifier
from macer_serve.checkpoint import CheckpointConfig, load_config, load_model
from macer_serve.datasets import load_dataset
from macer_serve.evaluation.certify import certified_row
from macer_serve.evaluation.logs import Row
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.training import held_out
from macer_serve.training.held_out import certified_curve
from macer_serve.training.precision import Precision
from macer_serve.training.run_state import RunFolder

Train = Callable[..., Result]
EXACT = Precision(torch.device("cpu"), "fp32", False, 1)
SIGMA = 0.5
# 64 images: four steps an epoch.
LEARNING = ("--dataset", "mnist", "--method", "gaussian", "--sigma", SIGMA, "--batch", 16, "--lr", 0.05)
LEARNING += ("--milestones", 99)


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's files with digits that are learnt in a few steps: a bar whose place tells the class; 8 to test."""
    root = tmp_path_factory.mktemp("bars")
    raw, generator = root / "MNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, count in (("train", 64), ("t10k", 8)):
        labels = generator.permutation(np.arange(count) % 10).astype(np.uint8)
        pixels = generator.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            row, col = (int(label) // 5) * 14, (int(label) % 5) * 5
            image[row : row + 14, col : col + 6] += 150
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return root


def curves_of(out: Path) -> list[dict[str, Any]]:
    return RunFolder(out.with_name(out.name + ".run")).certified()


def without_time(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in curve.items() if name != "seconds"} for curve in curves]


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def certified(model: nn.Sequential, config: CheckpointConfig, data: Path, indices: list[int]) -> list[Row]:
    """The rows that certification gives, by the plan and the noise of curves.

    Noise goes by the digest of the configuration: in training that is the one without weights and metrics.
    """
    images = load_dataset("mnist", data, "test")
    in_training = replace(config, files={"model.safetensors": "sha256:" + "0" * 64}, metrics={})
    how: dict[str, Any] = {"device": "cpu", "precision": "fp32", "compile": False}
    with voter_of(model, input_shape=config.input_shape, sigma=SIGMA, **how) as voter:
        classifier = SmoothedClassifier(in_training, voter=voter, issuer=held_out._SEEDS)
        return [certified_row(classifier, images, idx, held_out.PLAN) for idx in indices]


def assert_is_of(curve: dict[str, Any], rows: list[Row]) -> None:
    """The figures of the rows, each computed anew."""
    scores = np.array([row.radius if row.correct else 0.0 for row in rows])
    right = np.array([row.correct for row in rows])
    assert curve["acr"] == pytest.approx(scores.mean(), rel=1e-12)
    assert curve["acr_error"] == pytest.approx(scores.std(ddof=1) / len(rows) ** 0.5, rel=1e-12)
    assert curve["abstained"] == np.mean([row.predict == -1 for row in rows])
    assert set(curve["certified"]) >= {"0.0", "0.25", "0.5"}
    for radius, accuracy in curve["certified"].items():
        assert accuracy == np.mean(right & (scores >= float(radius)))
    assert (curve["n"], curve["alpha"]) == (1000, 0.001) == (rows[0].n, held_out.PLAN.alpha)


@pytest.fixture(scope="module")
def finished(bars: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Train], tuple[tuple[Any, ...], Path]]:
    """The command and checkpoint of a run of five epochs, certified every second one; every state is kept."""
    out = tmp_path_factory.mktemp("finished") / "out"
    certifying = ("--held-out", 4, "--certify-every", 2, "--keep", 99)
    command = (*LEARNING, *certifying, "--epochs", 5, "--data-dir", bars, "--out", out)

    def make(train: Train) -> tuple[tuple[Any, ...], Path]:
        if not out.exists():
            result = train(*command)
            assert result.exit_code == 0, result.output
        return command, out

    return make


def test_curves_are_those_of_the_epochs_asked_for_and_of_the_last(finished: Any, train: Train) -> None:
    _, out = finished(train)
    curves = curves_of(out)
    assert [curve["epoch"] for curve in curves] == [1, 3, 4]
    assert all(curve["images"] == "every 2nd of 0-6" for curve in curves), "evenly spread"
    assert len({curve["acr"] for curve in curves}) == 3
    assert curves[-1]["acr"] > 0.1, "something was learnt: the curves are not empty"
    assert load_config(out).metrics["held_out"] == curves[-1]
    assert load_config(out).metrics["epoch"] == 4


def test_the_last_curve_is_what_certification_gives_for_the_checkpoint(finished: Any, train: Train, bars: Path) -> None:
    _, out = finished(train)
    config, model = load_model(out)
    assert_is_of(curves_of(out)[-1], certified(model, config, bars, [0, 2, 4, 6]))


def test_a_curve_on_the_way_is_what_certification_gives_for_the_weights_of_its_epoch(
    finished: Any, train: Train, bars: Path
) -> None:
    _, out = finished(train)
    config, model = load_model(out)
    (saved,) = out.with_name("out.run").glob("state-00000002-*.pt")
    model.load_state_dict(torch.load(saved, weights_only=True)["model"])
    assert_is_of(curves_of(out)[0], certified(model, config, bars, [0, 2, 4, 6]))


def test_of_a_run_with_averaged_weights_the_average_is_certified(bars: Path, train: Train, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--epochs", 3, "--ema", 0.8, "--held-out", 3, "--certify-every", 2)
    result = train(*LEARNING, *options, "--data-dir", bars, "--out", out)
    assert result.exit_code == 0, result.output
    config, model = load_model(out)
    assert_is_of(curves_of(out)[-1], certified(model, config, bars, [0, 2, 4]))
    state = torch.load(RunFolder(tmp_path / "out.run").states()[0], weights_only=True)
    assert state["epoch"] == 2
    model.load_state_dict(state["average"])
    rows = certified(model, config, bars, [0, 2, 4])
    assert_is_of(curves_of(out)[0], rows)
    model.load_state_dict(state["model"])
    others = certified(model, config, bars, [0, 2, 4])
    assert [row.count_a for row in others] != [row.count_a for row in rows], "the weights are not their average"


def test_a_curve_missing_of_a_finished_run_is_made_up(finished: Any, train: Train) -> None:
    """As when the run was killed between its last state and the curve."""
    command, out = finished(train)
    before, weights, metrics = curves_of(out), weights_of(out), load_config(out).metrics
    path = out.with_name("out.run") / "certified.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert len(curves_of(out)) == len(before) - 1
    again = train(*command)
    assert again.exit_code == 0, again.output
    assert without_time(curves_of(out)) == without_time(before)
    assert weights_of(out) == weights
    assert without_time([load_config(out).metrics["held_out"]]) == without_time([metrics["held_out"]])


@pytest.mark.parametrize("killed_after", [2, 4])
def test_a_run_killed_between_state_and_curve_makes_it_up(
    finished: Any, train: Train, tmp_path: Path, killed_after: int
) -> None:
    """What is on the disk then: states and log up to an epoch, curves up to the one before."""
    command, original = finished(train)
    run, out = tmp_path / "out.run", tmp_path / "out"
    run.mkdir()
    for state in RunFolder(original.with_name("out.run")).states():
        if int(state.stem.split("-")[1]) <= killed_after:
            (run / state.name).write_bytes(state.read_bytes())
    for name, last in (("log.jsonl", killed_after - 1), ("certified.jsonl", killed_after - 2)):
        lines = (original.with_name("out.run") / name).read_text().splitlines()
        (run / name).write_text("".join(line + "\n" for line in lines if json.loads(line)["epoch"] <= last))
    before = without_time(curves_of(original))
    assert len(curves_of(out)) == before.index(next(c for c in before if c["epoch"] == killed_after - 1))
    continued = train(*command[:-1], out)
    assert continued.exit_code == 0, continued.output
    assert weights_of(out) == weights_of(original)
    assert without_time(curves_of(out)) == before, "the name being the same, so is the noise"


def test_a_curve_that_is_there_is_not_made_again(finished: Any, train: Train, monkeypatch: Any) -> None:
    command, out = finished(train)
    before = (out.with_name("out.run") / "certified.jsonl").read_bytes()
    monkeypatch.setattr("macer_serve.training.worker.certified_curve", lambda *a, **k: pytest.fail("made again"))
    assert train(*command).exit_code == 0
    assert (out.with_name("out.run") / "certified.jsonl").read_bytes() == before


def test_weights_are_the_same_with_and_without_curves_on_the_way(bars: Path, train: Train, tmp_path: Path) -> None:
    """To the last bit. (A voter computes with one thread; the run goes on with its own.)"""
    command = (*LEARNING, "--epochs", 3, "--threads", 2, "--data-dir", bars)
    for name, how in (("with", ("--held-out", 1, "--certify-every", 1)), ("without", ("--held-out", 0))):
        result = train(*command, *how, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert [curve["epoch"] for curve in curves_of(tmp_path / "with")] == [0, 1, 2]
    assert not (tmp_path / "without.run" / "certified.jsonl").exists()
    assert "held_out" not in load_config(tmp_path / "without").metrics
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")


def test_a_curve_leaves_model_and_threads_alone_and_is_the_same_again(bars: Path) -> None:
    torch.manual_seed(0)
    model = base_classifier("lenet", classes=10, input_shape=(1, 28, 28), mean=(0.0,), std=(1.0,)).train()
    images = load_dataset("mnist", bars, "test")
    files = {"model.safetensors": "sha256:" + "0" * 64}
    config = CheckpointConfig("it", "lenet", images.classes, (1, 28, 28), (0.0,), (1.0,), SIGMA, 28, files)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    threads, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        precision = replace(EXACT, threads=2)
        curves = [certified_curve(model, config, images, 2, precision, progress=seen.append) for _ in range(2)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert without_time(curves[:1]) == without_time(curves[1:])
    assert [row.idx for row in seen] == [0, 4, 0, 4]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_missing_test_split_is_reported_before_training(tree: Path, train: Train, tmp_path: Path) -> None:
    (tree / "val").rename(tree / "elsewhere")
    options = ("--dataset", "imagenet", "--data-dir", tree, "--size", 32, "--arch", "lenet", "--loaders", 0)
    command = (*options, "--method", "gaussian", "--epochs", 1, "--batch", 8, "--out", tmp_path / "out")
    refused = train(*command, "--held-out", 5)
    assert refused.exit_code == 4
    assert "--held-out" in refused.output
    assert str(tree) in refused.output
    assert "Traceback" not in refused.output
    assert not (tmp_path / "out.run").exists(), "no step was made"
    without = train(*command, "--held-out", 0)
    assert without.exit_code == 0, without.output


def test_a_test_split_with_other_classes_is_reported_before_training(tree: Path, train: Train, tmp_path: Path) -> None:
    (tree / "val" / "cat").rename(tree / "val" / "dog")
    options = ("--dataset", "imagenet", "--data-dir", tree, "--size", 32, "--arch", "lenet", "--loaders", 0)
    refused = train(*options, "--method", "gaussian", "--epochs", 1, "--held-out", 5, "--out", tmp_path / "out")
    assert refused.exit_code == 4
    assert "other classes" in refused.output
    assert "--held-out" in refused.output
    assert not (tmp_path / "out.run").exists()


def test_curves_on_the_way_need_images(bars: Path, train: Train, tmp_path: Path) -> None:
    command = (*LEARNING, "--data-dir", bars, "--out", tmp_path / "out", "--certify-every", 1)
    reasons = {0: "no held-out images to certify between epochs", -1: "held-out images must not be negative"}
    for count, why in reasons.items():
        refused = train(*command, "--held-out", count)
        assert refused.exit_code == 2
        assert why in refused.output


@pytest.mark.parametrize(("count", "images"), [(1, "image 0"), (99, "images 0-7")])
def test_the_command_says_what_was_certified(bars: Path, train: Train, tmp_path: Path, count: int, images: str) -> None:
    command = (*LEARNING, "--epochs", 1, "--held-out", count, "--data-dir", bars, "--out", tmp_path / "out")
    result = train(*command)
    assert result.exit_code == 0, result.output
    (curve,) = curves_of(tmp_path / "out")
    assert f"certified, {images}, n = 1,000: ACR {curve['acr']:.4f}" in result.output, "no more than there are"
    assert (curve["acr_error"] is None) == (count == 1), "one image has no standard error"
