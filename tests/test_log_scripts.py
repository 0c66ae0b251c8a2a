"""Our logs are what the field's scripts read: pandas with a tab, then masks, means and curves over the columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import ROOT, blocks

from macer_serve.evaluation.logs import LogWriter, Row, read_log
from macer_serve.evaluation.summaries import summary

RADII = np.arange(0.0, 1.01, 0.25)
ROWS = (
    Row(0, 3, 3, 0.502113, True, 0.412903, 0.977683112, 1_000, 979, 3),
    Row(20, 8, -1, 0.0, False, 0.5, 0.25, 1_000, 300, 2),
    Row(40, 1, 1, 0.75, True, 86_403.0, 0.99, 1_000, 998, 1),
    Row(60, 5, 6, 0.9, False, 1.25, 0.99, 1_000, 999, 6),  # wrong, however sure
    Row(80, 1, 1, 0.0, True, 3.0),  # certified, its radius rounded down to 0
    Row(100, 2, -1, 0.0, False, 3.0, 0.1, 40, 20, 2),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "log.tsv"
    with LogWriter.open(path, {"dataset": "cifar10", "sigma": 0.25, "n": 1000}) as log:
        for row in ROWS:
            log.write(row)
    return path


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, delimiter="\t")


# The figures that analysis scripts compute from the columns, each by one function of the table.


def certified_accuracy(log: pd.DataFrame, radius: float) -> float:
    return (log["correct"] & (log["radius"] >= radius)).mean()


def certified_accuracy_times(log: pd.DataFrame, radius: float) -> float:
    return (log["correct"] * (log["radius"] >= radius)).mean()


def average_certified_radius(log: pd.DataFrame) -> float:
    return (log["correct"] * log["radius"]).mean()


def abstention_rate(log: pd.DataFrame) -> float:
    return (log["predict"] == -1).sum() / len(log["predict"])


def misclassification_rate(log: pd.DataFrame) -> float:
    return (~log["correct"].astype(bool) & (log["predict"] != -1)).mean()


def mean_seconds(log: pd.DataFrame) -> float:
    return pd.to_timedelta(log["time"]).dt.total_seconds().mean()


def curve(log: pd.DataFrame, step: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Returns what certified-accuracy plots draw: a grid of radii to just beyond the largest, accuracy at each."""
    grid = np.arange(0.0, log["radius"].max() + step, step)
    return grid, np.array([certified_accuracy(log, radius) for radius in grid])


def test_every_column_has_its_type_without_further_options(path: Path) -> None:
    log = read(path)
    assert list(log.columns[:6]) == ["idx", "label", "predict", "radius", "correct", "time"]
    assert len(log) == len(ROWS)
    assert all(log[name].dtype == np.int64 for name in ("idx", "label", "predict", "correct"))
    assert log["radius"].dtype == np.float64
    assert log["radius"].tolist() == [row.radius for row in ROWS]
    assert log["p_lower"].isna().tolist() == [row.p_lower is None for row in ROWS]


@pytest.mark.parametrize("accuracy", [certified_accuracy, certified_accuracy_times])
def test_scripts_find_the_reports_figures(path: Path, accuracy: Callable[[pd.DataFrame, float], float]) -> None:
    log, ours = read(path), summary(read_log(path), tuple(RADII.tolist()))
    assert [accuracy(log, radius) for radius in RADII] == [at.accuracy for at in ours.certified]
    assert [at.accuracy for at in ours.certified] == pytest.approx([3 / 6, 2 / 6, 2 / 6, 1 / 6, 0.0])
    assert average_certified_radius(log) == pytest.approx(ours.acr)
    assert abstention_rate(log) == pytest.approx(ours.abstained)
    assert misclassification_rate(log) == pytest.approx(1 / 6)
    assert mean_seconds(log) == pytest.approx(ours.seconds_mean)


def test_plots_of_several_logs(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    with LogWriter.open(other, {}) as log:
        log.write(ROWS[0])
    curves = {name: curve(read(tmp_path / name)) for name in ("log.tsv", "other.tsv")}
    for grid, accuracy in curves.values():
        assert (np.diff(accuracy) <= 0).all()
        assert accuracy[-1] == 0.0
        assert grid[-1] > 0.5
    table = pd.DataFrame({name: [certified_accuracy(read(tmp_path / name), r) for r in RADII] for name in curves})
    assert table.idxmax(axis=1).tolist()[:3] == ["other.tsv"] * 3


def test_the_documented_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    (script,) = blocks(ROOT / "docs" / "logs.md", "python")
    found: dict[str, Any] = {}
    exec(script, found)
    ours = summary(read_log(path), (0.25,))
    assert found["certified_accuracy"] == ours.certified[0].accuracy
    assert (found["acr"], found["abstained"]) == pytest.approx((ours.acr, ours.abstained))


def test_the_documented_columns(path: Path) -> None:
    page = (ROOT / "docs" / "logs.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(read(path).columns)


def test_logs_are_joined_by_image(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    with LogWriter.open(other, {}) as log:
        for row in ROWS[:3]:
            log.write(row)
    both = read(path).merge(read(other), on="idx", suffixes=("", "_other"))
    assert both["radius"].equals(both["radius_other"])
    assert len(both) == 3


def test_a_log_that_is_still_being_written_is_read(path: Path) -> None:
    path.write_text(path.read_text() + "120\t3\t3\t0.25")
    log = read(path)
    assert len(log.dropna(subset="time")) == len(read_log(path).rows) == len(ROWS)


def test_an_empty_log_is_an_empty_table(tmp_path: Path) -> None:
    LogWriter.open(tmp_path / "new.tsv", {}).close()
    assert read(tmp_path / "new.tsv").empty


@pytest.mark.parametrize(
    "call",
    [
        lambda path: pd.read_csv(path, delimiter="\t"),
        lambda path: pd.read_csv(path, sep="\t"),
        lambda path: pd.read_csv(path, delimiter="\t", index_col="idx").reset_index(),
        lambda path: pd.read_csv(path, delimiter="\t", index_col="idx").sort_index().reset_index(),
        lambda path: pd.read_csv(path, sep=r"\t", engine="python"),
        lambda path: pd.read_table(path),
        lambda path: pd.read_csv(path.open(), delimiter="\t"),
        lambda path: pd.read_csv(path, delimiter="\t", usecols=["idx", "radius", "correct"]),
        lambda path: pd.read_csv(path, delimiter="\t", comment="#"),
        lambda path: pd.read_csv(path, delimiter="\t", dtype=str).astype({"radius": float, "correct": int}),
        lambda path: pd.DataFrame(np.genfromtxt(path, delimiter="\t", names=True, encoding="utf-8")),
    ],
)
def test_ways_to_read_a_log(path: Path, call: Callable[[Path], pd.DataFrame]) -> None:
    log = call(path)
    assert (log["correct"] * log["radius"]).mean() == pytest.approx(summary(read_log(path)).acr)
