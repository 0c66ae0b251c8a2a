"""`benchmarks/gpu.py` measures each of its parts; without a GPU by `--tiny`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*options: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    done = run("--tiny")
    assert done.returncode == 0, done.stderr
    assert "noise: 384 coordinates, 0 differ from the specified stream" in done.stdout
    assert "votes: of 64 in fp32 at least 0 are for another class" in done.stdout
    for part in ("matrix products bf16", "resnet20 at 32, bf16", "resnet20 at 32, fp32"):
        assert part in done.stdout
    for method in ("gaussian", "macer", "smoothadv", "consistency"):
        assert f"training {method}" in done.stdout
    assert "not measured" not in done.stdout


def test_without_a_gpu_the_benchmark_says_what_runs() -> None:
    done = run()
    assert done.returncode == 2
    assert "torch sees no GPU here; --tiny runs on a CPU" in done.stderr
