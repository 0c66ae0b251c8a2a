"""The report gives the published figures of the published logs, and hand-computed ones of small logs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from scipy.stats import beta

from macer_serve.cli import main
from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import Log, LogWriter, Row, read_log
from macer_serve.evaluation.reports import FORMATS
from macer_serve.evaluation.reports.summary_table import summary_table
from macer_serve.evaluation.summaries import (
    default_radii,
    describe_images,
    restrict,
    summary,
)

SMALL = Log(
    rows=(
        Row(0, 1, 1, 0.5, True, 1.0),
        Row(20, 1, 2, 0.9, False, 2.0),  # wrong: counts 0, however large its radius
        Row(40, 1, -1, 0.0, False, 3.0),
        Row(60, 1, 1, 0.0, True, 10.0),  # certified at 0, though its radius was rounded down to 0
    ),
    settings={"sigma": "0.25"},
    name="folder/small.tsv",
    radius_decimals=6,
)


def macer(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


@pytest.fixture
def published() -> Path:
    root = os.environ.get("MACER_SHARED_DATA")
    if not root:
        pytest.skip("needs the published logs: set MACER_SHARED_DATA to the folder that holds logs/")
    folder = Path(root) / "logs"
    if not folder.is_dir():
        pytest.skip(f"needs the published logs: there is no {folder}")
    return folder


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.tsv"
    with LogWriter.open(path, SMALL.settings) as log:
        for row in SMALL.rows:
            log.write(row)
    return path


# The published logs


@pytest.mark.parametrize(
    ("log", "span", "image_set", "acr", "certified"),
    [
        ("macer", None, "images 0-9999", "0.5313", "79.5 69.0 55.8 40.6"),
        ("macer", "500:1000", "images 500-999", "0.5554", "81.2 71.2 59.4 42.4"),
        ("gaussian", None, "images 0-9999", "0.4240", "76.6 61.2 42.2 25.1"),
        ("smoothadv", None, "images 0-9999", "0.5512", "74.8 66.7 57.6 47.8"),
    ],
)
def test_published_figures(
    published: Path, log: str, span: str | None, image_set: str, acr: str, certified: str
) -> None:
    path = published / f"cifar10_resnet110_{log}_sigma0.25.tsv.gz"
    result = macer(path, *(("--range", span) if span else ()))
    assert result.exit_code == 0
    titles, row, *notes = result.output.splitlines()
    assert titles.split()[5:9] == ["r=0", "r=0.25", "r=0.5", "r=0.75"]
    cells = row.split()
    assert cells[:2] == [path.name, "*"]
    assert " ".join(cells[2:4]) == image_set
    assert cells[5] == acr
    assert " ".join(cells[8:12]) == certified
    assert "rounded to nearest" in notes[-1]


@pytest.mark.parametrize(
    ("method", "sigma", "acr", "error"),
    [
        ("gaussian", "0.5", 0.525, 0.007),
        ("gaussian", "1.0", 0.511, 0.012),
        ("macer", "0.5", 0.691, 0.007),
        ("macer", "1.0", 0.744, 0.012),
    ],
)
def test_published_acr_and_its_error(published: Path, method: str, sigma: str, acr: float, error: float) -> None:
    found = summary(read_log(published / f"cifar10_resnet110_{method}_sigma{sigma}.tsv.gz"))
    assert found.acr == pytest.approx(acr, abs=5e-4)
    assert found.acr_error is not None
    assert 0.5 * error < found.acr_error < 1.1 * error


def test_every_published_log_is_read(published: Path) -> None:
    paths = sorted(published.glob("*.tsv.gz"))
    assert len(paths) == 12
    result = macer(*paths)
    assert result.exit_code == 0
    assert "every 100th of 0-49900" in result.output


# Small logs


def test_summary_of_a_small_log() -> None:
    found = summary(SMALL, (0.0, 0.5, 0.51))
    assert found.images == 4
    assert found.acr == 0.125
    # contributions 0.5, 0, 0, 0: variance 0.0625 with n - 1
    assert found.acr_error == pytest.approx(0.25 / 2)
    assert [(at.radius, at.certified, at.accuracy) for at in found.certified] == [
        (0.0, 2, 0.5),
        (0.5, 1, 0.25),
        (0.51, 0, 0.0),
    ]
    assert found.abstained == 0.25
    assert (found.seconds_mean, found.seconds_median) == (4.0, 2.5)
    assert found.votes_mean is None, "it does not say"
    assert found.image_set == "every 20th of 0-60"
    assert found.settings == {"sigma": "0.25"}
    assert not found.rounded_radii


def test_votes_an_image_where_the_log_says() -> None:
    folder = Path(__file__).parents[1] / "results" / "bundled"
    assert summary(read_log(folder / "certify-every20-n10000.tsv")).votes_mean == 10_000


def test_intervals_are_clopper_pearson() -> None:
    two, one, none = summary(SMALL, (0.0, 0.5, 0.51)).certified
    for at in (two, one):
        k = at.certified
        assert at.low == pytest.approx(beta.ppf(0.025, k, 4 - k + 1), abs=1e-12)
        assert at.high == pytest.approx(beta.ppf(0.975, k + 1, 4 - k), abs=1e-12)
    assert none.low == 0.0
    assert none.high == pytest.approx(1 - 0.025**0.25, abs=1e-12)


def test_one_image_has_no_standard_error() -> None:
    found = summary(restrict(SMALL, 0, 1))
    assert found.acr == 0.5
    assert found.acr_error is None
    assert found.image_set == "image 0"
    table = summary_table([found])
    assert "0.5000" in FORMATS["text"](table)
    assert json.loads(FORMATS["json"](table))[0]["acr_error"] is None


def test_range_is_half_open() -> None:
    assert [row.idx for row in restrict(SMALL, 20, 60).rows] == [20, 40]
    assert restrict(SMALL, None, None) == SMALL


@pytest.mark.parametrize("radii", [(-0.25,), (math.nan,), (math.inf,)])
def test_radii_out_of_range(radii: tuple[float, ...]) -> None:
    with pytest.raises(ParameterError, match="radii must be finite"):
        summary(SMALL, radii)


@pytest.mark.parametrize(("largest", "last"), [(0.1, 0.75), (0.953, 0.75), (1.0, 1.0), (1.91, 1.75), (3.8, 2.0)])
def test_default_radii(largest: float, last: float) -> None:
    logs = [SMALL, Log((Row(0, 1, 1, largest, True, 1.0), Row(1, 1, 2, 9.0, False, 1.0)))]
    radii = default_radii(logs)
    assert radii == tuple(0.25 * i for i in range(len(radii)))
    assert radii[-1] == last


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (range(10_000), "images 0-9999"),
        (range(0, 10_000, 20), "every 20th of 0-9980"),
        (range(500, 1000), "images 500-999"),
        (range(999, 499, -1), "images 500-999"),
        (range(1, 10, 2), "every 2nd of 1-9"),
        (range(0, 100, 11), "every 11th of 0-99"),
        (range(0, 100, 21), "every 21st of 0-84"),
        ([7], "image 7"),
        ([0, 1, 5], "3 of 0-5"),
    ],
)
def test_image_sets_in_words(indices: list[int], words: str) -> None:
    assert describe_images(indices) == words


def test_table_is_aligned_and_needs_equal_radii() -> None:
    coarse = Log((Row(0, 1, 1, 0.953, True, 1234.0),), name="other.tsv", radius_decimals=3)
    radii = default_radii([SMALL, coarse])
    table = FORMATS["text"](summary_table([summary(SMALL, radii), summary(coarse, radii)])).splitlines()
    assert len({len(line) for line in table[:3]}) == 1
    assert table[1].startswith("small.tsv  ")
    assert table[2].startswith("other.tsv *")
    assert table[2].endswith("1234    1234")
    with pytest.raises(ParameterError, match="same radii"):
        summary_table([summary(SMALL, (0.0,)), summary(coarse, (0.5,))])


def test_logs_of_one_name_keep_their_folders() -> None:
    names = ("a/log.tsv", "b/log.tsv")
    table = summary_table([summary(Log(SMALL.rows, name=name), (0.0,)) for name in names])
    assert [row[0] for row in table.rows] == list(names)


# The command


def test_command_prints_the_table_without_the_footnote(small_file: Path) -> None:
    result = macer(small_file, "--radii", "0,0.5")
    assert result.exit_code == 0
    assert result.output.splitlines()[1].split() == (
        [
            "small.tsv",
            "every",
            "20th",
            "of",
            "0-60",
            "4",
            "0.1250",
            "+/-",
            "0.1250",
            "50.0",
            "25.0",
            "55.6",
            "25.0",
            "-",
            "4.00",
            "2.50",
        ]
    )
    assert "rounded to nearest" not in result.output


def test_command_prints_json(small_file: Path) -> None:
    (found,) = json.loads(macer(small_file, "--format=json", "--range", ":30").output)
    assert found["image_set"] == "every 20th of 0-20"
    assert found["acr"] == 0.25
    assert found["settings"] == {"sigma": "0.25"}
    assert [at["radius"] for at in found["certified"]] == [0.0, 0.25, 0.5, 0.75]
    assert set(found["certified"][0]) == {"radius", "certified", "accuracy", "low", "high"}


@pytest.mark.parametrize("content", [None, b"", b"not a log\n", b"\x1f\x8bdamaged"])
def test_no_log_is_exit_code_5_and_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    result = macer(path)
    assert result.exit_code == 5
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith(f"macer: {path}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "options", [["--radii", "a"], ["--radii", "-1"], ["--radii", "nan"], ["--range", "5"], ["--range", "100:"]]
)
def test_bad_options_are_exit_code_2(small_file: Path, options: list[str]) -> None:
    result = macer(small_file, *options)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
