"""Every format of the report gives the published figures, marks the best, and is read by other programs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from macer_serve.cli import main
from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import Log, Row
from macer_serve.evaluation.reports import FORMATS, Table
from macer_serve.evaluation.reports.summary_table import summary_table
from macer_serve.evaluation.summaries import summary

# ACR, and certified accuracy at 0, 0.25, 0.5, 0.75: images 0-9999, sigma = 0.25.
PUBLISHED = {
    "gaussian": ("0.4240", "76.6", "61.2", "42.2", "25.1"),
    "macer": ("0.5313", "79.5", "69.0", "55.8", "40.6"),
    "smoothadv": ("0.5512", "74.8", "66.7", "57.6", "47.8"),
}
RADII = ("0", "0.25", "0.5", "0.75")


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def published() -> list[Path]:
    root = os.environ.get("MACER_SHARED_DATA")
    if not root:
        pytest.skip("needs the published logs: set MACER_SHARED_DATA to the folder that holds logs/")
    return [Path(root) / "logs" / f"cifar10_resnet110_{method}_sigma0.25.tsv.gz" for method in PUBLISHED]


def log_of(radii: Sequence[float], name: str, first: int = 0) -> Log:
    """Returns a log of correct images with these radii."""
    rows = tuple(Row(first + idx, 1, 1, radius, True, 1.0) for idx, radius in enumerate(radii))
    return Log(rows, name=name, radius_decimals=6)


def table_of(*logs: Log) -> Table:
    return summary_table([summary(log, (0.0, 0.25, 0.5)) for log in logs])


# The published figures


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_published_figures_in_words(published: list[Path], form: str) -> None:
    lines = report(*published, "--format", form).stdout.splitlines()
    for path, figures in zip(published, PUBLISHED.values(), strict=True):
        (line,) = [line.replace("\\", "") for line in lines if path.name.partition(".")[0] in line.replace("\\", "")]
        numbers = re.findall(r"\d+\.\d+", re.sub(r".*?0-9999", "", line))
        assert (numbers[0], *numbers[2:6]) == figures


def test_published_figures_for_programs(published: list[Path]) -> None:
    as_csv = list(csv.DictReader(io.StringIO(report(*published, "--format", "csv").stdout)))
    as_json = json.loads(report(*published, "--format", "json").stdout)
    for (acr, *accuracies), of_csv, of_json in zip(PUBLISHED.values(), as_csv, as_json, strict=True):
        assert f"{float(of_csv['acr']):.4f}" == f"{of_json['acr']:.4f}" == acr
        shares = [at["accuracy"] for at in of_json["certified"]]
        assert [f"{100 * share:.1f}" for share in shares] == accuracies
        assert [float(of_csv[f"certified.{radius}.accuracy"]) for radius in RADII] == shares
        assert [float(of_csv[f"certified.{radius}.low"]) for radius in RADII] < shares
        assert of_csv["images"] == "10000"
        assert of_csv["votes_mean"] == "", "these logs do not say"


# The best


def test_the_best_of_a_column_is_the_best_of_its_image_set() -> None:
    one, two = log_of([0.3, 0.3], "one"), log_of([0.6, 0.1], "two")
    elsewhere = log_of([0.9, 0.9], "elsewhere", first=500)
    table = table_of(one, two, elsewhere)
    best = {(table.rows[row][0], table.titles[column]) for row, column in table.best}
    both = {(name, "r=0") for name in ("one", "two")}  # as good as each other
    assert best == both | {("two", "ACR"), ("one", "r=0.25"), ("two", "r=0.5")}
    assert not table_of(one).best
    assert not table_of(one, elsewhere).best


def test_figures_that_print_alike_are_equally_good() -> None:
    table = table_of(log_of([0.300001], "one"), log_of([0.300002], "two"))
    assert {row for row, column in table.best if table.titles[column] == "ACR"} == {0, 1}


def test_bold_leaves_the_error_plain() -> None:
    table = table_of(log_of([0.3, 0.3], "one"), log_of([0.6, 0.1], "two"))
    assert "| **0.3500** ± 0.2500 |" in FORMATS["markdown"](table)
    assert r" & \textbf{0.3500} $\pm$ 0.2500 & " in FORMATS["latex"](table)
    assert "**" not in FORMATS["text"](table)


def test_no_log_is_no_table() -> None:
    with pytest.raises(ParameterError, match="no log"):
        summary_table([])


# Other programs


HOSTILE = r"a_b & 50% of $x$ #1 {~^} \input{x} <|> `c` *d* [e]"


def test_markdown_keeps_hostile_names_in_one_cell() -> None:
    lines = FORMATS["markdown"](table_of(log_of([0.3], HOSTILE), log_of([0.4], "b"))).splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in lines[:4]]
    assert {len(row) for row in cells} == {len(cells[0])}
    assert re.sub(r"\\([\\`*_|<>\[\]~])", r"\1", cells[2][1]).strip() == HOSTILE


def test_csv_keeps_hostile_names_in_one_cell() -> None:
    name = 'a,"b"\nc'
    (row,) = csv.DictReader(io.StringIO(FORMATS["csv"](table_of(log_of([0.3], name)))))
    assert row["name"] == name


def test_latex_compiles(published: list[Path], tmp_path: Path) -> None:
    """Once, without an error and without a box that is too wide for its page."""
    if not shutil.which("pdflatex"):
        pytest.skip("needs pdflatex: apt-get install texlive-latex-base texlive-latex-recommended")
    coarse = Log((Row(0, 1, 1, 0.953, True, 1.0),), name="other.tsv", radius_decimals=3)
    tables = [
        report(*published, "--format", "latex").stdout,
        FORMATS["latex"](table_of(log_of([0.3], HOSTILE), coarse)),
        report("--table3", f"bundled:cifar10={ROOT / 'results/bundled/train.jsonl'}", "--format", "latex").stdout,
        report(*sorted((ROOT / "results" / "training").glob("*.jsonl")), "--format", "latex").stdout,
    ]
    document = "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage[paperwidth=40cm,margin=1cm]{geometry}",
            r"\usepackage{booktabs}",
            r"\begin{document}",
            *(f"\\noindent\n{table}\n\n" for table in tables),
            r"\end{document}",
        ]
    )
    (tmp_path / "report.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert "Missing character" not in (tmp_path / "report.log").read_text(errors="replace")


ROOT = Path(__file__).resolve().parent.parent


# Training runs


def test_a_run_is_reported_by_its_folder_its_checkpoint_and_its_log(tmp_path: Path) -> None:
    run = tmp_path / "mine.run"
    run.mkdir()
    (tmp_path / "mine").mkdir()
    lines = [{"epoch": at, "loss": 2.0 / (at + 1), "lr": 0.1, "seconds": 1800.0, "note": "a"} for at in range(3)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "certified.jsonl").write_text('{"epoch": 2, "acr": 0.25, "acr_error": null}\n')
    for path in (run, tmp_path / "mine"):
        titles, row, *_ = report(path).stdout.splitlines()
        assert titles.split() == ["run", "epochs", "hours", "loss", "acr", "lr"]
        assert row.split() == ["mine", "3", "1.50", "0.6667", "0.25", "0.1"]
    assert report(run / "log.jsonl").stdout.splitlines()[1].split() == ["mine", "3", "1.50", "0.6667", "0.1"]
    epochs = json.loads(report(run, "--format", "json").stdout)
    assert [(one["run"], one["epoch"], one["loss"]) for one in epochs] == [
        (str(run), at, 2.0 / (at + 1)) for at in range(3)
    ]
    assert len(report(run, "--format", "csv", "--label", "MACER").stdout.splitlines()) == 4


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", '{"epoch": 0}\n', '{"epoch": 0, "seconds"', "\xff"])
def test_what_is_no_training_log(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(text.encode("latin-1"))
    result = report(path)
    assert result.exit_code == 5
    assert result.stderr.startswith(f"macer: {path}")
    assert result.stderr.count("\n") == 1


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    result = report(tmp_path)
    assert result.exit_code == 5
    assert "name the training log" in result.stderr


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "A", "--label", "B"], "2 labels for 1 logs"),
        (["--panels", "accuracy"], "name the file of the figure"),
        (["--plot", "x.jpg"], "*.pdf, *.png, *.svg"),
        (["--plot", "x.png", "--panels", "radius"], "there is no panel 'radius'"),
        (["results"], "without certification logs beside them"),
        (["--format", "html"], "'html' is not one of"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = report("tests/logs/good.tsv", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
