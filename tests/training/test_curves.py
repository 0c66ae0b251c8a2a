"""Curves show every logged number once, whatever happened to the run."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from small_runs import QUICK, states_of
from tensorboardX.proto.event_pb2 import Event

from macer_serve.errors import InterruptedRunError
from macer_serve.training.options import Callbacks, TrainingOptions
from macer_serve.training.recipes import recipe
from macer_serve.training.run import run_training

pytestmark = pytest.mark.usefixtures("one_thread")
Train = Callable[..., Result]


def scalars_of(run: Path) -> Counter[tuple[str, int, float]]:
    """(tag, step, value) of all scalars in the event files: length, its checksum, an event, its checksum; repeated."""
    found: Counter[tuple[str, int, float]] = Counter()
    for path in (run / "tensorboard").glob("events.*"):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found.update((value.tag, event.step, value.simple_value) for value in event.summary.value)
            at += 12 + length + 4
        assert at == len(data)
    return found


def logged(run: Path) -> Counter[tuple[str, int, float]]:
    """What the logs say, as it should be shown."""
    found: Counter[tuple[str, int, float]] = Counter()
    for kind, name in (("train", "log.jsonl"), ("certified", "certified.jsonl")):
        for line in map(json.loads, (run / name).read_text().splitlines() if (run / name).exists() else []):
            values = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "epoch"}
            values |= {f"accuracy_at_radius_{r}": value for r, value in line.get("certified", {}).items()}
            found.update((f"{kind}/{key}", line["epoch"], np.float32(value)) for key, value in values.items())
    return found


def session(mnist: Path, out: Path, **options: Any) -> TrainingOptions:
    defaults: dict[str, Any] = {"device": "cpu", "precision": "fp32", "compile_": "off", "threads": 1, "held_out": 0}
    return TrainingOptions("mnist", mnist, out, "gaussian", 0.25, **{**defaults, **options})


def test_every_logged_number_is_shown_once(mnist: Path, train: Train, tmp_path: Path) -> None:
    certified = ("--held-out", 2, "--certify-every", 1, "--tensorboard")
    command = (*QUICK, *certified, "--data-dir", mnist, "--out", tmp_path / "out")
    assert train(*command).exit_code == 0
    shown = scalars_of(tmp_path / "out.run")
    assert shown == logged(tmp_path / "out.run")
    assert set(shown.values()) == {1}
    names = {"train/loss", "train/lr", "train/noisy_correct", "certified/acr", "certified/accuracy_at_radius_0.25"}
    assert {(name, epoch) for name in names for epoch in (0, 1)} <= {(tag, step) for tag, step, _ in shown}
    assert train(*command).exit_code == 0
    assert scalars_of(tmp_path / "out.run") == shown, "a finished run, once more"


@pytest.mark.parametrize("at", [(1, 3), (2, 1)], ids=["after an epoch", "within one"])
def test_an_interrupted_run_shows_every_number_once(mnist: Path, tmp_path: Path, at: tuple[int, int]) -> None:
    options = session(mnist, tmp_path / "out", tensorboard=True, held_out=2, certify_every=2)
    chosen = recipe("mnist", "gaussian", 0.25).with_options(epochs=4, batch=16, lr=0.1)

    def stop(epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        if (epoch, step) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        run_training(options, chosen, Callbacks(progress=stop))
    run = tmp_path / "out.run"
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    assert scalars_of(run) == logged(run), "what there is can be seen already"
    run_training(options, chosen)
    shown = scalars_of(run)
    assert shown == logged(run)
    assert set(shown.values()) == {1}
    assert {step for tag, step, _ in shown if tag == "train/loss"} == {0, 1, 2, 3}
    assert {step for tag, step, _ in shown if tag == "certified/acr"} == {1, 3}


def test_a_refused_command_leaves_the_curves_as_they_are(mnist: Path, train: Train, tmp_path: Path) -> None:
    command = (*QUICK, "--tensorboard", "--data-dir", mnist, "--out", tmp_path / "out")
    assert train(*command).exit_code == 0
    shown = scalars_of(tmp_path / "out.run")
    assert train(*command, "--seed", 1).exit_code == 6
    assert scalars_of(tmp_path / "out.run") == shown == logged(tmp_path / "out.run")


def test_no_curves_where_none_are_wanted(mnist: Path, train: Train, tmp_path: Path) -> None:
    assert train(*QUICK, "--no-tensorboard", "--data-dir", mnist, "--out", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out.run" / "tensorboard").exists()


def test_curves_without_tensorboardx_are_refused_before_training(
    mnist: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused = train(*QUICK, "--tensorboard", "--data-dir", mnist, "--out", tmp_path / "out")
    assert refused.exit_code == 6
    assert "install it, or train without event files (--no-tensorboard)" in refused.output
    assert not states_of(tmp_path / "out")
