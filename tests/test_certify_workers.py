"""Workers of a Ray cluster write the log that one process writes, whichever of them are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.errors import ClusterError, DataError, EngineMismatchError, ParameterError
from macer_serve.evaluation import ray_workers
from macer_serve.evaluation.logs import Row, read_log
from macer_serve.evaluation.ray_workers import Job, WorkerPool
from macer_serve.ray_cluster import ray_cluster
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four images of each of the bundled checkpoint's classes, laid out as ImageFolder."""
    dice = np.random.default_rng(0)
    for name in load_config("bundled:cifar10").classes:
        folder = tmp_path / "tree" / "val" / name
        folder.mkdir(parents=True)
        for number in range(4):
            colour = dice.integers(0, 256, (1, 1, 3))
            pixels = (colour + dice.integers(-40, 41, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "tree"


def certify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["certify", "bundled:cifar10", "--dataset", "imagenet", *map(str, arguments)])


class Started:
    """`macer certify` in a process of its own, on two workers."""

    def __init__(self, out: Path, *arguments: object) -> None:
        self.out = out
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        code = "from macer_serve.cli import main; main()"
        command = [sys.executable, "-c", code, "certify", "bundled:cifar10", "--dataset", "imagenet"]
        command += ["--workers", "2", "--cores", "1", "--out", str(out), *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_ADDRESS": ""},
        )

    def wait_for_rows(self, count: int) -> None:
        while not self.out.exists() or self.out.read_bytes().count(b"\n") <= count:
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)

    def kill_a_worker(self) -> None:
        below = psutil.Process(self.process.pid).children(recursive=True)
        workers = [child for child in below if "ray::Worker" in " ".join(child.cmdline())]
        assert len(workers) == 2
        workers[0].kill()


def test_the_log_is_that_of_one_process_whatever_is_killed(tree: Path, tmp_path: Path) -> None:
    """A worker is killed, then the run as a whole; the same command continues it."""
    options = ("--data-dir", tree, "--n", 1000)
    alone, workers = tmp_path / "alone.tsv", tmp_path / "workers.tsv"
    assert certify(*options, "--out", alone).exit_code == 0
    run = Started(workers, *options)
    run.wait_for_rows(4)
    run.kill_a_worker()
    run.wait_for_rows(16)
    run.process.kill()
    run.process.communicate()
    output, _ = (again := Started(workers, *options)).process.communicate(timeout=400)
    assert again.process.returncode == 0, output
    assert "40 images, ACR 0." in output
    assert "ACR=0." in output, "the progress bar shows it"

    def content(path: Path) -> list[list[str]]:
        lines = [line.split("\t") for line in path.read_text().splitlines()]
        time_at = lines[0].index("time")
        return [cells[:time_at] + cells[time_at + 1 :] for cells in lines]

    assert content(workers) == content(alone)
    assert read_log(workers).settings == read_log(alone).settings
    assert [row.idx for row in read_log(workers).rows] == list(range(40))


# The pool, with workers that compute nothing


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine, for the tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_cluster():
            yield


def pool_of(monkeypatch: pytest.MonkeyPatch, worker: type, workers: int = 2) -> WorkerPool:
    """Returns a pool of such workers."""
    monkeypatch.setattr(ray_workers, "Worker", worker)
    options = VoterOptions(device="cpu", workers=1)
    return WorkerPool(Job("bundled:cifar10", "x", Path("x"), None, "exact", "0", None, False, Plan(), options), workers)


def indices(rows: Iterator[Row]) -> list[int]:
    return [row.idx for row in rows]


def test_rows_come_in_order_and_an_images_error_after_the_rows_before_it(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uneven:  # local, so that Ray pickles it by value: its processes cannot import this module
        def __init__(self, job: Job) -> None:
            pass

        def open(self) -> str:
            return "engine"

        def certify(self, idx: int) -> Row:
            if idx == 7:
                raise DataError("image 7 is damaged", settings=("data_dir",))
            time.sleep(0.3 if idx == 0 else 0.0)
            return Row(idx, 1, 1, 0.5, True, 1.0)

    with pool_of(monkeypatch, Uneven) as pool:
        assert pool.engine == "engine"
        assert indices(pool.rows([5, 0, 3, 9])) == [5, 0, 3, 9]
        assert indices(pool.rows([])) == []
        rows = pool.rows([0, 1, 2, 7, 8])
        assert [next(rows).idx for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DataError) as raised:
            next(rows)
        assert raised.value.settings == ("data_dir",)
        assert str(raised.value) == "image 7 is damaged"


def test_an_image_that_kills_its_workers_is_named(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mortal:
        def __init__(self, job: Job) -> None:
            pass

        def open(self) -> str:
            return "engine"

        def certify(self, idx: int) -> Row:
            if idx == 2:
                os._exit(1)
            return Row(idx, 1, 1, 0.5, True, 1.0)

    with pool_of(monkeypatch, Mortal) as pool:
        rows = pool.rows([0, 1, 2, 3])
        assert [next(rows).idx for _ in range(2)] == [0, 1]
        with pytest.raises(ClusterError, match="3 workers were lost while they certified image 2"):
            next(rows)


def test_workers_that_never_open_end_the_run(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stillborn:
        def __init__(self, job: Job) -> None:
            pass

        def open(self) -> str:
            os._exit(1)

    with pytest.raises(ClusterError, match="lost 3 times and no image was finished"):
        pool_of(monkeypatch, Stillborn, workers=1)


def test_engines_that_differ_are_refused(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlike:
        def __init__(self, job: Job) -> None:
            pass

        def open(self) -> str:
            return f"engine {os.getpid()}"

        def certify(self, idx: int) -> Row:
            time.sleep(0.05)
            return Row(idx, 1, 1, 0.5, True, 1.0)

    with pytest.raises(EngineMismatchError, match="engines differ"), pool_of(monkeypatch, Unlike) as pool:
        indices(pool.rows(range(1000)))


def test_what_opening_raises_is_raised_as_it_is(cluster: None, tmp_path: Path) -> None:
    job = Job("bundled:cifar10", "mnist", tmp_path, None, "exact", "0", None, False, Plan(), VoterOptions(device="cpu"))
    with pytest.raises(DataError, match=r"^mnist is not under"):
        WorkerPool(job, 1)
    with pytest.raises(ParameterError, match="1000 workers need one each, and the cluster has"):
        WorkerPool(job, 1000)
