"""Small data sets in torchvision's layouts, and `macer train` run in this process or in its own."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from macer_serve.cli import main

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., Result]
Start = Callable[..., "subprocess.Popen[str]"]


def _write_mnist(root: Path, images: int) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", images), ("t10k", 10)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return root


@pytest.fixture(scope="session", autouse=True)
def no_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which image files could be read is remembered for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Random digits: 40 to train on."""
    return _write_mnist(tmp_path / "data", 40)


@pytest.fixture(scope="module")
def long_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random digits, enough for an epoch to be interrupted; no batch size in use divides their number."""
    return _write_mnist(tmp_path_factory.mktemp("long-mnist"), 1003)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An ImageFolder tree: 3 classes of 5 images, each of one colour that tells its class."""
    generator = np.random.default_rng(0)
    for index, name in enumerate(("ant", "bee", "cat")):
        for split in ("train", "val"):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number in range(5):
                pixels = generator.integers(0, 60, (40, 48, 3), dtype=np.uint8)
                pixels[:, :, index] += 180
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "tree"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch in this process, as `train` has it; their number is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def train() -> Iterator[Train]:
    """`macer train` in this process, uncompiled, in fp32 on one thread, certifying nothing, unless told otherwise."""
    threads = torch.get_num_threads()

    def run(*arguments: Any) -> Result:
        defaults: tuple[Any, ...] = ("--device", "cpu", "--compile", "off", "--precision", "fp32", "--threads", "1")
        defaults += ("--held-out", "0", "--no-tensorboard")
        return CliRunner().invoke(main, [str(a) for a in ("train", *defaults, *arguments)])

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """`macer train` in a process of its own, and group; killed at the end if it still runs."""
    started: list[subprocess.Popen[str]] = []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(paths)}

    def run(*arguments: Any) -> subprocess.Popen[str]:
        code = "from macer_serve.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "train", "--device", "cpu", "--held-out", "0", *(str(a) for a in arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
