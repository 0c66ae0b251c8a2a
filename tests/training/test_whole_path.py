"""From real CIFAR-10 images to a certificate: what `macer train` writes, every other command reads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from macer_serve.cli import main

Train = Callable[..., Result]
IMAGE = Path(__file__).parents[1] / "images" / "0001-ship.png"


def macer(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.data
@pytest.mark.skipif("MACER_DATA_DIR" not in os.environ, reason="MACER_DATA_DIR names no data sets")
@pytest.mark.parametrize("method", ["gaussian", "macer"])
def test_train_certify_report_predict(train: Train, tmp_path: Path, method: str) -> None:
    data, out, log = os.environ["MACER_DATA_DIR"], tmp_path / "mine", tmp_path / "mine.tsv"
    options = ("--dataset", "cifar10", "--data-dir", data)
    few = ("--limit", 600, "--epochs", 1, "--batch", 128, *(("--k", 2) if method == "macer" else ()))
    trained = train(*options, *few, "--method", method, "--arch", "resnet20", "--lr", 0.05, "--out", out)
    assert trained.exit_code == 0, trained.output
    config = json.loads((out / "config.json").read_text())
    assert config["classes"][8] == "ship"
    assert (config["sigma"], config["recipe"]["method"], config["recipe"]["epochs"]) == (0.25, method, 1)

    macer("certify", out, *options, "--every", 2000, "--n", 500, "--no-compile", "--workers", 1, "--out", log)
    rows = [line.split("\t") for line in log.read_text().splitlines() if not line.startswith("#")]
    assert [row[0] for row in rows[1:]] == ["0", "2000", "4000", "6000", "8000"]
    (report,) = json.loads(macer("report", "--json", log).stdout)
    correct = [float(row[3]) for row in rows[1:] if row[4] == "1"]
    assert report["images"] == 5
    assert report["acr"] == pytest.approx(sum(correct) / 5)

    certificate = json.loads(macer("predict", IMAGE, "--checkpoint", out, "--n", 500, "--json").stdout)
    assert certificate["model"]["name"] == "mine"
    assert sum(certificate["votes"]) == certificate["n"] == 500
