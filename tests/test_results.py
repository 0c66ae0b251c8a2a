"""Figures that pages give of certification logs follow from the logs in results/, read without the package's reader."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from pages import ROOT

from macer_serve.cli import main

BUNDLED, TRAINING = ROOT / "results" / "bundled", ROOT / "results" / "training"
README, BUNDLED_PAGE = ROOT / "README.md", ROOT / "results" / "bundled.md"
SEQUENTIAL, TRAINING_PAGE = ROOT / "results" / "sequential.md", ROOT / "docs" / "training.md"


def rows(log: Path) -> list[dict[str, str]]:
    """Returns the rows of a log of tab-separated values, comments left out."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines, delimiter="\t"))


def column(log: Path, name: str) -> npt.NDArray[np.float64]:
    """Returns a column of numbers."""
    return np.array([float(row[name]) for row in rows(log)])


def certified(log: Path) -> npt.NDArray[np.float64]:
    """Returns the certified radius of each image; a wrong class and an abstention count 0."""
    return column(log, "radius") * column(log, "correct")


def with_error(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Returns the mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


def says(page: Path, words: str) -> bool:
    """Returns whether a page has the words, wherever its lines break and whatever is in bold."""
    text = page.read_text(encoding="utf-8").replace("**", "").replace("\u2212", "-")
    return words in " ".join(text.split())


@pytest.mark.parametrize(
    ("page", "log", "words"),
    [
        (README, BUNDLED / "certify-every20-n10000.tsv", "{acr:.4f} ± {error:.4f}"),
        (BUNDLED_PAGE, BUNDLED / "certify-every20-n10000.tsv", "ACR {acr:.4f} ± {error:.4f}"),
        (BUNDLED_PAGE, BUNDLED / "certify-every20-n10000.tsv", "and {abstained:.1f} % abstentions"),
        (BUNDLED_PAGE, BUNDLED / "certify-every20-n10000-bf16.tsv", "{acr:.4f} with {abstained:.1f} % abstentions"),
        (BUNDLED_PAGE, BUNDLED / "certify-every125-macer-stage.tsv", "{acr:.4f} after the second stage"),
        (BUNDLED_PAGE, BUNDLED / "certify-every125-gaussian.tsv", "{acr:.4f} before it"),
        (TRAINING_PAGE, TRAINING / "mnist-fast-gaussian-every20.tsv", "{acr:.4f} ± {error:.4f}"),
        (TRAINING_PAGE, TRAINING / "mnist-fast-smoothadv-every20.tsv", "{acr:.4f} ± {error:.4f}"),
        (TRAINING_PAGE, TRAINING / "mnist-fast-macer-every20.tsv", "{acr:.4f} ± {error:.4f}"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_a_pages_acr_is_that_of_its_log(page: Path, log: Path, words: str) -> None:
    acr, error = with_error(certified(log))
    abstained = 100 * float((column(log, "predict") == -1).mean())
    expected = words.format(acr=acr, error=error, abstained=abstained)
    assert says(page, expected), f"{page.name} does not say {expected!r}"


@pytest.mark.parametrize(
    ("page", "one", "other", "words"),
    [
        (README, "mnist-fast-macer-every20", "mnist-fast-gaussian-every20", "{:+.4f} ± {:.4f}"),
        (TRAINING_PAGE, "mnist-fast-macer-every20", "mnist-fast-gaussian-every20", "{:+.4f} ± {:.4f}"),
        (TRAINING_PAGE, "mnist-fast-smoothadv-every20", "mnist-fast-macer-every20", "{:+.4f} ± {:.4f}"),
        (BUNDLED_PAGE, "certify-every20-n10000", "certify-every20-n10000-before", "{:.4f} ± {:.4f}, image by image"),
        (BUNDLED_PAGE, "certify-every20-n10000-before", "certify-every20-n10000-bf16", "{:+.4f} ± {:.4f}"),
        (BUNDLED_PAGE, "certify-every125-macer-stage", "certify-every125-gaussian", "{:.3f} ± {:.3f}"),
    ],
)
def test_a_pages_paired_difference_is_that_of_its_logs(page: Path, one: str, other: str, words: str) -> None:
    logs = [next((ROOT / "results").rglob(f"{name}.tsv")) for name in (one, other)]
    assert [row["idx"] for row in rows(logs[0])] == [row["idx"] for row in rows(logs[1])]
    expected = words.format(*with_error(certified(logs[0]) - certified(logs[1])))
    assert says(page, expected), f"{page.name} does not say {expected!r}"


def test_the_distribution_of_p_is_that_of_the_logs() -> None:
    """An image for which another class than its own was selected counts as p = 0."""
    tables = re.search(
        r"\| p \| (.*)\n.*\n\| now \| (.*)\n\| before \| (.*)\n", BUNDLED_PAGE.read_text(encoding="utf-8")
    )
    assert tables
    shares, now, before = ([float(cell) for cell in line.split("|")[:-1]] for line in tables.groups())
    assert len(shares) == 8
    for figures, name in ((now, "certify-every20-n10000"), (before, "certify-every20-n10000-before")):
        log = BUNDLED / f"{name}.tsv"
        p = np.where(column(log, "top") == column(log, "label"), column(log, "count_a") / column(log, "n"), 0.0)
        assert figures == [round(100 * float((p >= share).mean()), 1) for share in shares]


def test_the_certified_curve_is_that_of_the_log() -> None:
    """And `macer report`, as the page names it, prints the same."""
    table = re.search(r"\| radius \| 0 (.*)\n.*\n\| certified (.*)\n", BUNDLED_PAGE.read_text(encoding="utf-8"))
    assert table
    radii = [0.0, *(float(cell) for cell in table[1].split("|")[1:-1])]
    figures = [float(cell) for cell in table[2].split("|")[1:-1]]
    assert len(radii) == len(figures) == 17
    log = BUNDLED / "certify-every20-n10000.tsv"
    radius, right = column(log, "radius"), column(log, "correct") == 1
    assert figures == [round(100 * float((right & (radius >= r)).mean()), 1) for r in radii]
    result = CliRunner().invoke(main, ["report", str(log), "--format=json", "--radii", ",".join(map(str, radii))])
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    assert [round(100 * row["accuracy"], 1) for row in report["certified"]] == figures
    assert report["acr"] == pytest.approx(with_error(certified(log))[0], abs=1e-9)
    assert report["acr_error"] == pytest.approx(with_error(certified(log))[1], rel=0.01)


def test_what_deciding_a_radius_takes_is_that_of_the_log() -> None:
    log = BUNDLED / "certify-every20-radius0.25.tsv"
    votes, radius = column(log, "n"), column(log, "radius")
    seconds = [
        sum(x * float(t) for x, t in zip((3600, 60, 1), row["time"].split(":"), strict=True)) for row in rows(log)
    ]
    mean, error = with_error(votes)
    expected = (
        f"takes {mean:,.0f} ± {error:,.0f} estimation votes per image (standard error; median {np.median(votes):.0f}) "
        f"and {np.mean(seconds):.2f} s (median {np.median(seconds):.2f} s). It certifies the radius for "
        f"{(radius >= 0.25).sum()} of the {len(votes)} images"
    )
    assert says(SEQUENTIAL, expected), expected


def test_the_agreement_of_plans_is_that_of_the_log() -> None:
    log = BUNDLED / "agreement-radius0.25.tsv"
    pairs: Counter[Any] = Counter((row["radius_plan"], row["fixed_plan"]) for row in rows(log))
    undecided = sum(count for (plan, _), count in pairs.items() if plan not in ("certified", "refuted"))
    assert sum(pairs.values()) == 500
    for line in (
        f"| `radius` certifies | {pairs['certified', 'certified']} | {pairs['certified', 'refuted']} |",
        f"| `radius` refutes | {pairs['refuted', 'certified']} | {pairs['refuted', 'refuted']} |",
    ):
        assert says(SEQUENTIAL, line), line
    assert says(README, f"0 ({undecided} undecided)")
    mean, error = with_error(column(log, "radius_n"))
    assert says(SEQUENTIAL, f"{mean:,.0f} ± {error:,.0f} votes per image")
