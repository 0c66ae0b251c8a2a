"""A training run on many workers says in one line why Ray cannot start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Train = Callable[..., Result]


def test_ray_that_cannot_start_is_one_line(
    mnist: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nothing")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options = ("--dataset", "mnist", "--method", "gaussian", "--data-dir", mnist, "--epochs", 1)
    result = train(*options, "--workers", 2, "--out", tmp_path / "out")
    assert result.exit_code == 18, result.output
    assert result.stderr.splitlines()[-1].startswith("macer: Ray cannot start here: ")
    assert "Traceback" not in result.stderr
