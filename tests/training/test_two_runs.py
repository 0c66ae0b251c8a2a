"""Two trainings into one folder: the second is refused, told who trains there, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from macer_serve.cli.exit_codes import EXIT_CODES
from macer_serve.errors import OutputError

Train = Callable[..., Result]
Start = Callable[..., Any]
LONG = ("--dataset", "mnist", "--method", "gaussian", "--batch", 16, "--lr", 0.1, "--compile", "off", "--threads", 1)


@pytest.fixture
def first(start: Start, long_mnist: Path, tmp_path: Path) -> Any:
    """A training that goes on for hours, in its second epoch."""
    how = ("--data-dir", long_mnist, "--epochs", 100_000, "--no-tensorboard", "--out", tmp_path / "out")
    process = start(*LONG, *how)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out.run").glob("state-*.pt")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield process
    process.kill()
    process.wait()


def test_a_second_training_is_refused_however_it_is_asked_for(
    first: Any, train: Train, mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "deep").mkdir()
    common = (*LONG, "--data-dir", mnist, "--epochs", 1)
    variants: list[tuple[Any, ...]] = [
        ("--out", tmp_path / "out"),
        ("--out", "out"),
        ("--out", "./deep/../out"),
        ("--out", tmp_path / "link" / "out"),
        ("--out", tmp_path / "out", "--restart"),
        ("--out", tmp_path / "out", "--lr", 0.5, "--seed", 7),
        ("--out", tmp_path / "out", "--method", "macer", "--k", 2),
        ("--out", tmp_path / "out", "--epochs", 100_000),
        ("--out", tmp_path / "out", "--workers", 2),
        ("--out", tmp_path / "out", "--held-out", 3),
        ("--out", tmp_path / "out", "--keep", 1),
    ]
    for variant in variants:
        refused = train(*common, *variant)
        assert refused.exit_code == EXIT_CODES[OutputError], (variant, refused.output)
        assert f"out is being written by process {first.pid} on {os.uname().nodename} since " in refused.output
        assert "choose another output" in refused.output
    assert first.poll() is None
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()]
    assert epochs == list(range(len(epochs))), "no line of another run"
    elsewhere = train(*common, "--out", tmp_path / "other")
    assert elsewhere.exit_code == 0, elsewhere.output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_folder_is_free_as_soon_as_the_first_has_ended(
    first: Any, train: Train, mnist: Path, tmp_path: Path, number: int
) -> None:
    first.send_signal(number)
    first.communicate(timeout=120)
    result = train(*LONG, "--data-dir", mnist, "--epochs", 1, "--restart", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / ".out.lock").exists()


def test_decoding_processes_of_a_killed_training_do_not_hold_the_folder(
    start: Start, tree: Path, tmp_path: Path
) -> None:
    for number in range(5, 200):
        shutil.copy(tree / "train" / "ant" / "0.png", tree / "train" / "ant" / f"{number}.png")
    how = ("--dataset", "folder", "--method", "gaussian", "--arch", "resnet20", "--size", 32, "--batch", 4)
    command = (*how, "--compile", "off", "--threads", 1, "--data-dir", tree, "--out", tmp_path / "out")
    process = start(*command, "--epochs", 1000, "--save-every", 1, "--no-tensorboard")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out.run").glob("state-*.pt")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    again = start(*command, "--epochs", 1, "--limit", 3, "--restart", "--no-tensorboard")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output


def test_of_several_started_together_one_trains(start: Start, mnist: Path, tmp_path: Path) -> None:
    """Each is as good as another; one checkpoint is written, of the rate of the one that trained."""
    rates = (0.01, 0.02, 0.03)
    out = tmp_path / "out"
    runs = [
        start(*LONG, "--data-dir", mnist, "--epochs", 150, "--lr", rate, "--no-tensorboard", "--out", out)
        for rate in rates
    ]
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    trained = [rate for run, rate in zip(runs, rates, strict=True) if run.returncode == 0]
    assert len(trained) == 1, outputs
    for run, output in zip(runs, outputs, strict=True):
        # One that comes when another has ended finds a complete run with other settings.
        assert run.returncode == 0 or "is being written by" in output or "lr was" in output
    assert json.loads((out / "config.json").read_text())["recipe"]["lr"] == trained[0]
    lines = [json.loads(line) for line in (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(150))
