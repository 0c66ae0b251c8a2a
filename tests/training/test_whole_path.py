"""From real images to a certificate: what `macer train` writes, every other command reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from macer_serve.cli import main

Train = Callable[..., Result]
Start = Callable[..., "subprocess.Popen[str]"]
IMAGE = Path(__file__).parents[1] / "images" / "0001-ship.png"


def macer(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.data
@pytest.mark.skipif("MACER_DATA_DIR" not in os.environ, reason="MACER_DATA_DIR names no data sets")
def test_train_certify_report_predict(train: Train, tmp_path: Path) -> None:
    data, out, log = os.environ["MACER_DATA_DIR"], tmp_path / "mine", tmp_path / "mine.tsv"
    options = ("--dataset", "cifar10", "--data-dir", data)
    few = ("--limit", 600, "--epochs", 1, "--batch", 128, "--k", 2)
    trained = train(*options, *few, "--method", "macer", "--arch", "resnet20", "--lr", 0.05, "--out", out)
    assert trained.exit_code == 0, trained.output
    config = json.loads((out / "config.json").read_text())
    assert config["classes"][8] == "ship"
    assert (config["sigma"], config["recipe"]["method"], config["recipe"]["epochs"]) == (0.25, "macer", 1)

    macer("certify", out, *options, "--every", 2000, "--n", 500, "--no-compile", "--workers", 1, "--out", log)
    rows = [line.split("\t") for line in log.read_text().splitlines() if not line.startswith("#")]
    assert [row[0] for row in rows[1:]] == ["0", "2000", "4000", "6000", "8000"]
    (report,) = json.loads(macer("report", "--format", "json", log).stdout)
    correct = [float(row[3]) for row in rows[1:] if row[4] == "1"]
    assert report["images"] == 5
    assert report["acr"] == pytest.approx(sum(correct) / 5)

    certificate = json.loads(macer("predict", IMAGE, "--checkpoint", out, "--n", 500, "--json").stdout)["certificate"]
    assert certificate["model"]["name"] == "mine"
    assert sum(certificate["votes"]) == certificate["n"] == 500


@pytest.mark.data
@pytest.mark.skipif("MACER_DATA_DIR" not in os.environ, reason="MACER_DATA_DIR names no data sets")
def test_a_tree_of_two_hundred_classes(start: Start, tmp_path: Path) -> None:
    """ResNet-50 by the published recipe but for size and length: interrupted, continued, exported, certified."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(Path(os.environ["MACER_DATA_DIR"]) / "imagenet" / split)
    folders = sorted(path.name for path in (data / "train").iterdir())
    assert len(folders) == 200
    # Names as WordNet gives them, here made from the folders: a name, then a synonym.
    (data / "words.txt").write_text("".join(f"{folder}\tname of {folder}, synonym\n" for folder in folders))
    out = tmp_path / "mine"
    options = ("--dataset", "imagenet", "--data-dir", data, "--size", 64, "--limit", 64, "--batch", 8, "--epochs", 1)
    command = (*options, "--save-every", 2, "--loaders", 1, "--compile", "off", "--precision", "fp32", "--out", out)

    first = start(*command)
    while not list(tmp_path.glob("mine.run/state-*.pt")):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 143, output
    second = start(*command)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "resnet50"
    assert config["classes"][:2] == [f"name of {folder}" for folder in folders[:2]]
    assert (config["recipe"]["method"], config["recipe"]["k"], config["recipe"]["lam"]) == ("macer", 2, 6.0)

    macer("export", out, "--out", tmp_path / "mine.onnx")
    log = tmp_path / "mine.tsv"
    few = ("--every", 5000, "--n", 32, "--no-compile", "--workers", 1, "--batch", 8)
    macer("certify", out, "--dataset", "imagenet", "--data-dir", data, *few, "--out", log)
    rows = [line.split("\t") for line in log.read_text().splitlines() if not line.startswith("#")]
    assert [row[:2] for row in rows[1:]] == [["0", "0"], ["5000", "100"]]
