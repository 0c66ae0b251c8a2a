"""Table 3: what training cost, beside the radius it bought, ours and the published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from macer_serve.checkpoint import load_config
from macer_serve.cli import main

RESULTS = Path(__file__).parents[1] / "results" / "bundled"
TRAINED = RESULTS / "train.jsonl"


@pytest.fixture
def certified(tmp_path: Path) -> Path:
    """The committed log, of the bundled checkpoint by its present digest: it was written under an earlier one."""
    text = (RESULTS / "certify-every20-n10000.tsv").read_text()
    path = tmp_path / "certified.tsv"
    path.write_text(re.sub(r"checkpoint: sha256:\w+", f"checkpoint: {load_config('bundled:cifar10').digest}", text))
    return path


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_published_rows_stand_beside_ours(certified: Path) -> None:
    lines = report("--table3", f"bundled:cifar10={TRAINED}", certified).stdout.splitlines()
    published = {
        ("cifar10", "Gaussian (Cohen)"): ["31.4", "150", "1.31", "0.416"],
        ("cifar10", "SmoothAdv (Salman)"): ["1990.1", "150", "82.92", "0.538"],
        ("cifar10", "MACER"): ["504.0", "440", "61.60", "0.556"],
        ("imagenet", "Gaussian (Cohen)"): ["2154.5", "90", "53.86", "0.470"],
        ("imagenet", "SmoothAdv (Salman)"): ["7723.8", "90", "193.10", "0.528"],
        ("imagenet", "MACER"): ["3537.1", "120", "117.90", "0.544"],
    }
    for (data, method), figures in published.items():
        (line,) = [line for line in lines if line.startswith(data) and method in line and "P100" in line]
        assert line.split(method)[1].split()[:4] == figures
    (ours,) = [line for line in lines if "resnet20-s2" in line]
    assert ours.split("(Cohen)")[1].split()[1:4] == ["20", "0.55", "0.389"]
    assert "every 20th of 0-9980" in ours


def test_the_cost_is_the_training_logs(certified: Path) -> None:
    (row,) = json.loads(report("--json", "--table3", f"bundled:cifar10={TRAINED}", certified).stdout)
    seconds = [json.loads(line)["seconds"] for line in TRAINED.read_text().splitlines()]
    assert row["seconds"] == pytest.approx(sum(seconds[1:]) / 19), "the mean of the epochs after the first"
    assert row["hours"] == pytest.approx(sum(seconds) / 3600)
    assert row["epochs"] == 20
    assert row["acr"] == pytest.approx(0.38932, abs=1e-5)


def test_a_log_of_another_checkpoint_lends_no_radius(certified: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text(certified.read_text().replace("checkpoint: sha256:", "checkpoint: sha256:0"))
    (row,) = json.loads(report("--json", "--table3", f"bundled:cifar10={TRAINED}", other).stdout)
    assert (row["acr"], row["image_set"]) == (None, "")


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [(None, 5, "name the training log"), ("nonsense", 5, "is not a training log"), ("", 5, "holds no epoch")],
)
def test_a_training_log_that_cannot_be_read_is_named(
    tmp_path: Path, content: str | None, code: int, message: str
) -> None:
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_text(content)
    result = report("--table3", f"bundled:cifar10={path}")
    assert result.exit_code == code
    assert message in result.stderr


def test_a_report_on_nothing_is_refused() -> None:
    assert report().exit_code == 2
