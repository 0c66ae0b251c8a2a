"""Table 3: what training cost, beside the radius it bought, ours and the published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.evaluation.logs import settings_path

RESULTS = Path(__file__).parents[1] / "results" / "bundled"
TRAINED = RESULTS / "train-consistency.jsonl"
ACR = 0.44068  # of the bundled checkpoint on every 20th test image, as results/bundled.md says


@pytest.fixture
def certified() -> Path:
    """The committed log of the bundled checkpoint."""
    return RESULTS / "certify-every20-n10000.tsv"


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def ours(result: Result) -> dict[str, Any]:
    """Returns the one row that was not published."""
    (row,) = [row for row in json.loads(result.stdout) if "published" not in row["how"]]
    return dict(row)


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
    (line,) = [line for line in lines if "resnet20-s2" in line]
    assert line.split("(Jeong & Shin)")[1].split()[1:4] == ["10", "1.50", f"{ACR:.3f}"]
    assert "every 20th of 0-9980" in line


def test_the_cost_is_the_training_logs(certified: Path) -> None:
    row = ours(report("--format=json", "--table3", f"bundled:cifar10={TRAINED}", certified))
    seconds = [json.loads(line)["seconds"] for line in TRAINED.read_text().splitlines()]
    assert row["seconds"] == pytest.approx(sum(seconds[1:]) / 9), "the mean of the epochs after the first"
    assert row["hours"] == pytest.approx(sum(seconds) / 3600)
    assert row["epochs"] == 10
    assert row["acr"] == pytest.approx(ACR, abs=1e-5)


def test_a_log_of_another_checkpoint_lends_no_radius(certified: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_bytes(certified.read_bytes())
    settings = settings_path(certified).read_text()
    settings_path(other).write_text(settings.replace(load_config("bundled:cifar10").digest, "sha256:" + "0" * 64))
    row = ours(report("--format=json", "--table3", f"bundled:cifar10={TRAINED}", other))
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
