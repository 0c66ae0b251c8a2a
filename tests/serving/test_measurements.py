"""The measurement programs of benchmarks/ run: seconds of each, against the server of the other tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from serving.conftest import ROOT, Server

# Per program: the model, and words of its last tables.
PROGRAMS = {
    "serving.py": ("cifar10", ["HTTP and Serve", "n = 500 beside"]),
    "mixed_load.py": ("quick", ["counted again", "; 0 answers were not as expected"]),
    "overload.py": ("cifar10", ["of a core; requests sent late by", "slow uploads    "]),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_measurement_of_seconds_prints_its_tables(program: str, server: Server, tmp_path: Path) -> None:
    model, words = PROGRAMS[program]
    running = ["--running", str(server.folder / "smoothed.yaml"), "--model", model]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / program), "--tiny", *running, "--out", str(tmp_path / "out.txt")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out.txt").read_text() == done.stdout
    for said in words:
        assert said in done.stdout
    server.wait_until_ready()
