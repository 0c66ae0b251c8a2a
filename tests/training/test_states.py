"""The latest states are kept, as many as wanted, and an older one takes the place of a damaged one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from small_runs import QUICK, log_of, state_path, states_of

Train = Callable[..., Result]


@pytest.mark.parametrize("keep", [1, 2, 3, 99])
@pytest.mark.parametrize(
    ("save_every", "saved"),
    [
        (None, [(1, 0), (2, 0)]),
        (1, [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]),
        (2, [(0, 2), (1, 0), (1, 2), (2, 0)]),
        (3, [(1, 0), (2, 0)]),  # the last step of an epoch is its end
    ],
)
def test_exactly_the_latest_states_are_kept(
    mnist: Path, train: Train, tmp_path: Path, save_every: int | None, saved: list[tuple[int, int]], keep: int
) -> None:
    how = () if save_every is None else ("--save-every", save_every)
    result = train(*QUICK, *how, "--keep", keep, "--data-dir", mnist, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert states_of(tmp_path / "out") == saved[-keep:]
    for epoch, step in saved[-keep:]:
        state = torch.load(state_path(tmp_path / "out", epoch, step), weights_only=True)
        assert (state["epoch"], state["step"]) == (epoch, step)


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_an_older_state_takes_the_place_of_a_damaged_one(
    mnist: Path, train: Train, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    command = (*QUICK, "--save-every", 2, "--keep", 3, "--data-dir", mnist, "--out", out)
    train(*command)
    weights, losses = (out / "model.safetensors").read_bytes(), [line["loss"] for line in log_of(out)]
    kept = [(1, 0), (1, 2), (2, 0)]
    assert states_of(out) == kept
    for older, latest in ((kept[1], kept[2]), (kept[0], kept[1])):
        path = state_path(out, *latest)
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else b"")
        refused = train(*command)
        assert refused.exit_code == 6
        assert f"{path} is damaged" in refused.output
        assert f"remove it to continue from {state_path(out, *older).name}" in refused.output
        assert (out / "model.safetensors").read_bytes() == weights, "what there is is left alone"
        path.unlink()
    continued = train(*command)
    assert continued.exit_code == 0, continued.output
    assert (out / "model.safetensors").read_bytes() == weights
    assert [line["loss"] for line in log_of(out)] == losses, "each epoch once, every image counted once"
    assert states_of(out) == kept


def test_the_only_state_being_damaged_names_no_other(mnist: Path, train: Train, tmp_path: Path) -> None:
    command = (*QUICK, "--keep", 1, "--data-dir", mnist, "--out", tmp_path / "out")
    train(*command)
    state_path(tmp_path / "out", 2, 0).write_bytes(b"")
    refused = train(*command)
    assert refused.exit_code == 6
    assert "--restart" in refused.output
    assert "remove it to continue" not in refused.output


@pytest.mark.parametrize("option", ["--keep", "--save-every", "--micro-batch", "--certify-every"])
def test_none_of_them_can_be_0(mnist: Path, train: Train, tmp_path: Path, option: str) -> None:
    refused = train(*QUICK, option, 0, "--data-dir", mnist, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert f"must be at least 1 ({option})" in refused.output
