"""A new data set is one new file and one entry of the table: train and certify know it at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from macer_serve.cli import main
from macer_serve.datasets import DATASETS
from macer_serve.datasets.base import Arrays, DatasetInfo, MemoryArrays, Split


def stripes(root: Path, split: Split, download: bool) -> tuple[Arrays, tuple[str, ...]]:
    """The file of a new data set, in the tests: horizontal and vertical stripes."""
    if not (root / "stripes.txt").is_file():
        raise FileNotFoundError(f"{root / 'stripes.txt'} is missing")
    labels = np.arange(64 if split == "train" else 8) % 2
    lines = np.where(np.arange(28) % 4 < 2, 255, 0).astype(np.uint8)
    images = np.stack([np.tile(lines, (28, 1)) if label else np.tile(lines[:, None], (1, 28)) for label in labels])
    return MemoryArrays(images, labels.astype(np.int64)), ("horizontal", "vertical")


DATASET = DatasetInfo(
    "stripes", "stripes", (1, 28, 28), (0.0,), (1.0,), resize=28, layout="{root}/stripes.txt", architecture="lenet",
    read=stripes, first_files=("stripes.txt", "stripes.txt"), like="mnist",
)  # fmt: skip


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with one entry more. The options of the commands were made of it when they were imported."""
    monkeypatch.setitem(DATASETS, "stripes", DATASET)
    for name in ("train", "certify"):
        command = main.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        (option,) = (param for param in command.params if param.name == "dataset")
        monkeypatch.setattr(option.type, "choices", tuple(DATASETS))


def macer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("added")
def test_a_new_data_set_is_one_file_and_one_entry(tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ("--data-dir", tmp_path, "--epochs", 1, "--batch", 16, "--compile", "off", "--threads", 1, "--held-out", 0)
    train = ("train", "--dataset", "stripes", "--method", "gaussian", "--no-tensorboard", "--out", out, *how)
    refused = macer(*train)
    assert refused.exit_code == 4
    assert f"Expected layout: {tmp_path}/stripes.txt" in refused.output
    (tmp_path / "stripes.txt").touch()
    result = macer(*train)
    assert result.exit_code == 0, result.output
    assert "those of public code of Jeong & Shin 2020 for MNIST" in result.output
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["classes"]) == ("lenet", ["horizontal", "vertical"])
    certify = (
        "certify",
        out,
        "--dataset",
        "stripes",
        "--data-dir",
        tmp_path,
        "--n",
        200,
        "--out",
        tmp_path / "log.tsv",
    )
    result = macer(*certify, "--engine", "torch", "--no-compile")
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "log.tsv").read_text().splitlines()) == 9
