"""A Ray cluster that cannot be had is told in one line; cores are divided among workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.ray_cluster import cores_each

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An image of each of the bundled checkpoint's classes."""
    for name in load_config("bundled:cifar10").classes:
        folder = tmp_path / "tree" / "val" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(folder / "0.png")
    return tmp_path / "tree"


def certify(tree: Path, out: Path, *arguments: str) -> Result:
    where = ("--dataset", "imagenet", "--data-dir", str(tree), "--out", str(out))
    return CliRunner().invoke(main, ["certify", "bundled:cifar10", *where, *arguments])


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {"RAY_TMPDIR": "/proc/nothing"}, "Ray cannot start here: "),
        (["--address", "127.0.0.1:1"], {}, "cluster at 127.0.0.1:1 cannot be joined: [Errno 111]"),
        (["--address", "127.0.0.1:99999"], {}, "an address is HOST:PORT"),
        (["--address", "here"], {}, "an address is HOST:PORT"),
        ([], {"RAY_ADDRESS": "127.0.0.1:1"}, "cluster at 127.0.0.1:1 cannot be joined"),
    ],
)
def test_a_cluster_that_cannot_be_had_is_one_line(
    tree: Path,
    tmp_path: Path,
    arguments: Sequence[str],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = certify(tree, tmp_path / "log.tsv", "--workers", "1", *arguments)
    assert result.exit_code == 18, result.output
    assert result.stderr.startswith("macer: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.rstrip().endswith("(--address)") == bool(arguments)
    assert not (tmp_path / "log.tsv").exists()


def test_ray_is_started_again_if_its_agents_were_too_slow(tmp_path: Path) -> None:
    """An agent that starts 20 s late, as on a busy machine, has the raylet end itself."""
    late = tmp_path / "late"
    (tmp_path / "sitecustomize.py").write_text(
        f"""
from pathlib import Path
import time

late = Path({str(late)!r})
if b"dashboard/agent.py" in Path("/proc/self/cmdline").read_bytes() and not late.exists():
    late.touch()
    time.sleep(20)
"""
    )
    code = "from macer_serve.ray_cluster import ray_cluster\nwith ray_cluster('local'): print('up')"
    paths = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "up\n"), done.stderr[-2000:]
    assert late.exists()
    assert "is started once more" in done.stderr


def test_an_address_without_workers_is_refused(tmp_path: Path) -> None:
    result = certify(tmp_path, tmp_path / "log.tsv", "--address", "auto")
    assert result.exit_code == 2
    assert "(--workers)" in result.stderr


@pytest.mark.parametrize(
    ("machines", "workers", "cores"), [([8], 2, 4), ([8], 3, 2), ([8, 2], 2, 4), ([8, 2], 5, 2), ([1], 2, 0)]
)
def test_cores_are_divided_among_workers(machines: list[int], workers: int, cores: int) -> None:
    assert cores_each(machines, workers) == cores
