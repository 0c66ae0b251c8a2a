"""Nothing of a run is lost: it ends at the same weights whatever happened to it on the way, or says what to do."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from macer_serve.errors import TrainingError
from macer_serve.training.run_state import RunFolder

Train = Callable[..., Result]
Start = Callable[..., "subprocess.Popen[str]"]

# 1,003 images in batches of 64: the last batch is short. Two noisy copies, so that MACER's shapes are in play.
RECIPE = ("--dataset", "mnist", "--method", "macer", "--k", 8, "--epochs", 4, "--batch", 64, "--lam", 1)
QUICK = ("--dataset", "mnist", "--method", "gaussian", "--epochs", 2, "--batch", 16)


def wait_for_state(process: subprocess.Popen[str], out: Path, after: str) -> None:
    """Return as soon as there is a state later than `after`; the process must not end before."""
    while not [path for path in states_of(out) if path.name > after]:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.001)


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def states_of(out: Path) -> list[Path]:
    return sorted(out.with_name(out.name + ".run").glob("state-*.pt"))


def state_of(out: Path) -> dict[str, Any]:
    return torch.load(states_of(out)[-1], weights_only=True)  # type: ignore[no-any-return]


def test_stopped_and_killed_runs_end_at_the_weights_of_an_undisturbed_one(
    long_mnist: Path, start: Start, tmp_path: Path
) -> None:
    """Compiled, each continuation in a new process: SIGTERM within an epoch, then SIGKILL, then to the end."""

    def run(out: Path) -> subprocess.Popen[str]:
        options = ("--data-dir", long_mnist, "--compile", "on", "--threads", 1, "--save-every", 6)
        return start(*RECIPE, *options, "--out", out)

    undisturbed = run(tmp_path / "undisturbed")
    expected, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, expected

    out = tmp_path / "disturbed"
    first = run(out)
    wait_for_state(first, out, "state-00000001-00000000.pt")  # within the second epoch
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 143, output
    assert "Run the same command again" in output
    saved = state_of(out)
    assert saved["step"] > 0, "the signal was meant to arrive within an epoch"

    second = run(out)
    wait_for_state(second, out, "state-00000002-00000000.pt")  # within the third
    second.kill()
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    assert not out.exists()
    saved = state_of(out)
    assert (saved["step"] > 0, saved["epoch"]) == (True, 2)

    third = run(out)
    output, _ = third.communicate(timeout=300)
    assert third.returncode == 0, output
    assert weights_of(out) == weights_of(tmp_path / "undisturbed")
    logs = [
        [json.loads(line) for line in (tmp_path / f"{name}.run" / "log.jsonl").read_text().splitlines()]
        for name in ("undisturbed", "disturbed")
    ]
    assert [line["epoch"] for line in logs[1]] == [0, 1, 2, 3]
    losses = [[line["loss"] for line in lines] for lines in logs]
    assert losses[0] == losses[1], "an interrupted epoch counts every image once"


def test_a_finished_run_is_not_trained_again(mnist: Path, train: Train, tmp_path: Path) -> None:
    command = (*QUICK, "--data-dir", mnist, "--out", tmp_path / "out")
    first = train(*command)
    assert first.exit_code == 0, first.output
    at = (tmp_path / "out.run" / "log.jsonl").stat().st_mtime_ns
    again = train(*command)
    assert again.stdout == first.stdout, "the same digest"
    assert (tmp_path / "out.run" / "log.jsonl").stat().st_mtime_ns == at


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--epochs", 3), "recipe.epochs was 2, now 3"),
        (("--sigma", 0.5), "recipe.sigma was 0.25, now 0.5"),
        (("--seed", 1), "seed was 0, now 1"),
        (("--limit", 39), "limit was None, now 39"),
        (("--threads", 2), "precision.threads was 1, now 2"),
        (("--precision", "bf16"), "precision.bf16 was False, now True"),
    ],
)
def test_other_settings_do_not_continue_a_run(
    mnist: Path, train: Train, tmp_path: Path, changed: tuple[Any, ...], named: str
) -> None:
    command = (*QUICK, "--data-dir", mnist, "--out", tmp_path / "out")
    assert train(*command).exit_code == 0
    before = states_of(tmp_path / "out")[-1].read_bytes()
    refused = train(*command, *changed)
    assert refused.exit_code == 6
    assert named in refused.output
    assert "--restart" in refused.output
    assert states_of(tmp_path / "out")[-1].read_bytes() == before
    anew = train(*command, *changed, "--restart")
    assert anew.exit_code == 0, anew.output


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_a_damaged_state_is_refused_and_discarded_only_when_told_to(
    mnist: Path, train: Train, tmp_path: Path, damage: str
) -> None:
    command = (*QUICK, "--data-dir", mnist, "--out", tmp_path / "out")
    train(*command)
    weights, state = weights_of(tmp_path / "out"), states_of(tmp_path / "out")[-1]
    whole = state.read_bytes()
    state.write_bytes({"cut": whole[: len(whole) // 2], "zeros": bytes(len(whole)), "empty": b""}[damage])
    refused = train(*command)
    assert refused.exit_code == 6
    assert "is damaged" in refused.output
    assert "--restart" in refused.output
    assert "Traceback" not in refused.output
    anew = train(*command, "--restart")
    assert anew.exit_code == 0, anew.output
    assert weights_of(tmp_path / "out") == weights


@pytest.mark.parametrize("rate", [1e30, 1e12])
@pytest.mark.parametrize("method", ["gaussian", "macer", "smoothadv"])
@pytest.mark.parametrize("save_every", [(), ("--save-every", 1)])
def test_a_diverging_run_names_its_last_finite_state_only_if_there_is_one(
    mnist: Path, train: Train, tmp_path: Path, rate: float, method: str, save_every: tuple[Any, ...]
) -> None:
    few = () if method == "gaussian" else ("--k", 2)
    how = (*QUICK, "--method", method, *few, *save_every, "--data-dir", mnist, "--lr", rate)
    stopped = train(*how, "--out", tmp_path / "out")
    assert stopped.exit_code == 6, stopped.output
    assert "lower learning rate" in stopped.output
    assert not (tmp_path / "out").exists(), "no checkpoint is made of it"
    states = states_of(tmp_path / "out")
    assert (f"the last finite state is kept: {states[-1] if states else None}" in stopped.output) == bool(states)
    assert ("no state was saved before" in stopped.output) == (not states)
    if states:
        assert all(value.isfinite().all() for value in state_of(tmp_path / "out")["model"].values())


def test_a_run_that_diverges_later_names_the_state_before(mnist: Path, train: Train, tmp_path: Path) -> None:
    """The rate rises within the second epoch only: the state of the first is finite."""
    how = (*QUICK, "--data-dir", mnist, "--schedule", "one-cycle", "--warmup", 0.99, "--epochs", 2, "--save-every", 1)
    stopped = train(*how, "--lr", 1e25, "--momentum", 0, "--out", tmp_path / "out")
    assert stopped.exit_code == 6, stopped.output
    for state in states_of(tmp_path / "out"):
        assert all(value.isfinite().all() for value in torch.load(state, weights_only=True)["model"].values())
    assert ("no state was saved" in stopped.output) == (not states_of(tmp_path / "out"))


def test_a_disk_without_room_loses_nothing(mnist: Path, train: Train, tmp_path: Path) -> None:
    """The limit on a file's size stands for the full disk: the kernel refuses the same write."""
    command = (*QUICK, "--data-dir", mnist, "--out", tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        refused = train(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert refused.exit_code == 6
    assert "state-00000001-00000000.pt could not be written (File too large); no state was saved" in refused.output
    assert "Make room and run the same command again" in refused.output
    assert not list((tmp_path / "out.run").glob("*.tmp"))
    again = train(*command)
    assert again.exit_code == 0, again.output
    train(*QUICK, "--data-dir", mnist, "--out", tmp_path / "elsewhere")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "elsewhere")


def full_at(folder: Path, name: str) -> None:
    """Makes the next write of a file meet a full disk: it goes to the device that has no room."""
    folder.mkdir(exist_ok=True)
    (folder / name).with_suffix(".tmp").symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["state-00000001-00000000.pt", "state-00000002-00000000.pt", "log.jsonl"])
def test_a_full_disk_is_named_with_the_path(mnist: Path, train: Train, tmp_path: Path, name: str) -> None:
    command = (*QUICK, "--data-dir", mnist, "--out", tmp_path / "out")
    full_at(tmp_path / "out.run", name)
    refused = train(*command)
    assert refused.exit_code == 6
    assert f"{tmp_path / 'out.run' / name} could not be written (No space left on device)" in refused.output
    states = states_of(tmp_path / "out")
    assert [path.name for path in states] == (
        ["state-00000001-00000000.pt"] if name.startswith("state-00000002") else []
    )
    assert ("the last saved state is kept" in refused.output) == bool(states)
    assert not list((tmp_path / "out.run").glob("*.tmp"))
    again = train(*command)
    assert again.exit_code == 0, again.output
    train(*QUICK, "--data-dir", mnist, "--out", tmp_path / "elsewhere")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "elsewhere")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("keep", [2, 3])
def test_the_oldest_state_makes_room_and_the_latest_never_does(
    mnist: Path, train: Train, tmp_path: Path, keep: int
) -> None:
    command = (*QUICK, "--data-dir", mnist, "--save-every", 1, "--keep", keep, "--out", tmp_path / "out")
    full_at(tmp_path / "out.run", "state-00000001-00000000.pt")  # two states are there then, of steps 1 and 2
    result = train(*command)
    assert result.exit_code == 0, result.output
    train(*command[:-1], tmp_path / "elsewhere")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "elsewhere")
    assert len(states_of(tmp_path / "out")) == keep
    folder = RunFolder(tmp_path / "other.run", keep)
    state = {"epoch": 0, "model": {"w": torch.ones(2)}}
    for step in (1, 2, 3):
        if step > 1:
            full_at(folder.folder, f"state-00000000-{step:08d}.pt")
        if step == 2:
            with pytest.raises(
                TrainingError, match=r"No space left on device\); the last saved state is kept: .*001.pt"
            ):
                folder.save({**state, "step": step}, {})
            folder.save({**state, "step": step}, {})
        else:
            folder.save({**state, "step": step}, {})
    assert [path.name for path in folder.states()] == [f"state-00000000-{step:08d}.pt" for step in (2, 3)]


def test_an_output_folder_that_holds_something_else_is_refused_before_training(
    mnist: Path, train: Train, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refused = train(*QUICK, "--data-dir", mnist, "--out", tmp_path / "out")
    assert refused.exit_code == 3
    assert not (tmp_path / "out.run").exists()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
