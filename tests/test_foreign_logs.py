"""The report reads what others publish: predictions, files of headers alone, byte-order marks, half last lines."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from macer_serve.cli import main
from macer_serve.errors import LogError
from macer_serve.evaluation.logs import LogWriter, Row, read_log
from macer_serve.evaluation.summaries import summary

LOGS = Path(__file__).parent / "logs"
GOOD, HEADER, PREDICT, BOM = (LOGS / f"{name}.tsv" for name in ("good", "header", "predict", "bom"))

COHEN = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
PREDICTED = "idx\tlabel\tpredict\tcorrect\ttime\n"
TWO = "0\t3\t3\t0.502\t1\t0:00:10.123456\n20\t5\t-1\t0.0\t0\t0:00:11.0\n"


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def cells(result: Result, log: str) -> list[str]:
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(log)]
    return line.split("  ")


# Logs of PREDICT


def test_predictions_are_reported_without_radii() -> None:
    log = read_log(PREDICT)
    assert not log.has_radii
    found = summary(log)
    assert (found.images, found.acr, found.acr_error, found.abstained) == (2, None, None, 0.5)
    assert [(at.radius, at.accuracy) for at in found.certified] == [(0.0, 0.5)]
    result = report(PREDICT)
    assert result.exit_code == 0, result.output
    titles, row, *notes = result.stdout.splitlines()
    assert " ".join(titles.split()) == "log image set images ACR r=0 +/- abstained votes s/image median"
    assert " ".join(row.split()) == "predict.tsv every 20th of 0-20 2 - 50.0 48.7 50.0 - 1.50 1.50"
    assert "PREDICT" in notes[-1]


def test_predictions_stand_beside_certified_radii() -> None:
    result = report(PREDICT, GOOD)
    assert result.exit_code == 0
    assert "r=0.75" in result.stdout
    assert [c.strip() for c in cells(result, "predict.tsv") if c.strip()][3:9] == ["-", "50.0", "-", "-", "-", "48.7"]
    assert [c.strip() for c in cells(result, "good.tsv") if c.strip()][4:8] == ["66.7", "66.7", "33.3", "0.0"]
    first, second = json.loads(report(PREDICT, GOOD, "--format=json").stdout)
    assert (first["acr"], [at["radius"] for at in first["certified"]]) == (None, [0.0])
    assert len(second["certified"]) == 4
    only = report(PREDICT, "--radii", "0.5")
    assert only.exit_code == 0
    assert "r=0 " in only.stdout, "all that such a log can tell"


@pytest.mark.parametrize(
    ("text", "correct", "seconds"),
    [
        (PREDICTED + "0\t3\t3\t1\t0:00:01.5\n", [True], 1.5),
        (PREDICTED + "0\t3\t3\t1\t1.25", [True], 1.25),
        (PREDICTED.replace("\n", "\r\n") + "0\t3\t3\t1\t0:00:01\r\n", [True], 1.0),
        ("\ufeff" + PREDICTED + "0\t3\t2\t0\t0:00:01\n", [False], 1.0),
        (PREDICTED[:-1] + "\tnA\tnB\n0\t3\t3\t1\t0:00:01\t99\t1\n", [True], 1.0),
        (PREDICTED[:-1] + "\tn\tcount_a\n0\t3\t3\t1\t0:00:01\t100\t99\n", [True], 1.0),
        (PREDICTED + "0\t3\t-1\t0\t1 day, 0:00:01\n", [False], 86401.0),
        (PREDICTED + "0\t3\t3\t1\t0:00:01\n1\t3\t", [True], 1.0),
        (PREDICTED + "0\t3\t3\t1\t0:00:01\n\n\n", [True], 1.0),
        ("# sigma: 0.25\n" + PREDICTED + "0\t3\t3\t1\t0:00:01\n", [True], 1.0),
        (PREDICTED + "9\t3\t3\t1\t0:00:01\n0\t3\t4\t0\t0:00:01\n", [True, False], 1.0),
    ],
)
def test_predictions_in_many_forms(tmp_path: Path, text: str, correct: list[bool], seconds: float) -> None:
    path = tmp_path / "log"
    path.write_bytes(text.encode())
    log = read_log(path)
    assert not log.has_radii
    assert [row.correct for row in log.rows] == correct
    assert log.rows[0].seconds == seconds
    assert log.rows[0].radius == 0.0
    (tmp_path / "log.gz").write_bytes(gzip.compress(text.encode()))
    assert read_log(tmp_path / "log.gz").rows == log.rows
    assert report(path).exit_code == 0


@pytest.mark.parametrize(
    "text",
    [
        "idx\tlabel\tpredict\tRadius\tcorrect\ttime\n0\t3\t3\t0.5\t1\t1.0\n",  # not a log without radii
        "idx\tlabel\tpredict\ttime\n0\t3\t3\t1.0\n",
        PREDICTED + "0\t3\t3\t0.5\t1\t0:00:01\n",
        PREDICTED + "0\t3\t3\t0\t0:00:01\n",
        PREDICTED + "0\t3\t3\t1\n0\t3\t3\t1\t1.0\n",
    ],
)
def test_what_is_no_log_of_predictions(tmp_path: Path, text: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(LogError, match="log"):
        read_log(path)


# Logs without images


def test_a_log_of_a_header_alone_is_noted_and_the_others_are_tabulated() -> None:
    result = report(GOOD, HEADER)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"note: {HEADER} holds no image and is left out\n"
    assert result.stdout == report(GOOD).stdout


@pytest.mark.parametrize(
    "text",
    [
        COHEN,
        COHEN[:-1],
        COHEN + "\n\n",
        COHEN.replace("\n", "\r\n"),
        "\ufeff" + COHEN,
        PREDICTED,
        "# sigma: 0.25\n" + COHEN,
        COHEN[:-1] + "\tp_lower\tn\tcount_a\ttop\n",
        COHEN + "0\t3\t3",
        COHEN[:-1] + "\tp_lower\tn\tcount_a\ttop\n0\t3\t3\t0.5\t1\t1.0\t0.9\t10\t9\t3",
        COHEN + TWO,  # none in the range
    ],
)
def test_logs_without_images_in_many_forms(tmp_path: Path, text: str) -> None:
    empty = tmp_path / "empty.tsv"
    empty.write_text(text, newline="")
    span = ("--range", "40:")
    for arguments in ((empty, GOOD), (GOOD, empty), (empty, empty, GOOD), (empty, GOOD, "--format=json")):
        result = report(*arguments, *span)
        assert result.exit_code == 0, result.output
        assert f"note: {empty} holds no image and is left out\n" in result.stderr
        assert result.stdout == report(GOOD, *span, *[a for a in arguments if a == "--format=json"]).stdout
    nothing = report(empty, *span)
    assert nothing.exit_code == 2
    assert "no log holds an image" in nothing.stderr
    assert nothing.stdout == ""


def test_a_new_log_of_ours_is_noted_too(tmp_path: Path) -> None:
    LogWriter.open(tmp_path / "new.tsv", {"sigma": 0.25}).close()
    result = report(tmp_path / "new.tsv", GOOD)
    assert result.exit_code == 0
    assert "new.tsv holds no image" in result.stderr


@pytest.mark.parametrize("span", ["10:10", "10:5", ":0", "1000:500"])
def test_a_range_that_ends_before_it_starts(span: str) -> None:
    result = report(GOOD, "--range", span)
    assert result.exit_code == 2
    assert "there is no image from" in result.stderr


# Byte-order marks


def test_a_byte_order_mark_changes_nothing() -> None:
    assert BOM.read_bytes().startswith(codecs.BOM_UTF8)
    assert read_log(BOM).rows == read_log(GOOD).rows
    result = report(BOM)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].split()[1:] == report(GOOD).stdout.splitlines()[1].split()[1:]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text",
    [
        COHEN + TWO,
        (COHEN + TWO).replace("\n", "\r\n"),
        (COHEN + TWO)[:-1],
        COHEN + TWO + "\n",
        COHEN + TWO + "40\t8\t8\t0.2",
        "# dataset: cifar10\n" + COHEN + TWO,
        COHEN[:-1] + "\tnote\n" + TWO.replace("\n", "\tschön\n"),
    ],
)
def test_marks_of_many_encodings(tmp_path: Path, encoding: str, text: str) -> None:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    path = tmp_path / "log"
    for data in (mark + text.encode(encoding), gzip.compress(mark + text.encode(encoding))):
        path.write_bytes(data)
        assert [(row.idx, row.radius) for row in read_log(path).rows] == [(0, 0.502), (20, 0.0)]
        assert report(path).exit_code == 0


@pytest.mark.parametrize("data", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF8 * 2 + COHEN.encode()])
def test_a_mark_alone_or_twice_is_no_log(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(data)
    with pytest.raises(LogError, match="not a certification log"):
        read_log(path)


# Half last lines

FOURTH = "60\t6\t6\t0.125\t1\t0:00:09.5"


@pytest.mark.parametrize("size", range(1, len(FOURTH)))
def test_a_foreign_log_cut_within_its_last_line_loses_that_line_only(tmp_path: Path, size: int) -> None:
    path = tmp_path / "log.tsv"
    path.write_text(GOOD.read_text() + FOURTH[:size])
    log = read_log(path)
    assert log.rows[:3] == read_log(GOOD).rows
    if len(log.rows) == 3:
        assert log.notes == (f"the last line of {path} is not complete and is left out",)
        result = report(path)
        assert (result.exit_code, result.stderr) == (0, f"note: {log.notes[0]}\n")
    else:  # all values are there; of the time a digit may be missing
        assert log.rows[3:] == (Row(60, 6, 6, 0.125, True, log.rows[3].seconds),)
        assert log.notes == ()


@pytest.mark.parametrize(
    "last",
    [
        "60\t6\t6\tnan\t1\t0:00",  # an earlier value is wrong: this is no half line
        "sixty\t6\t6",
        "60\t6\t6\t0.125\t1\t0:00:09.5\tmore",
        "60\t6\t5\t0.125\t1\t0:00:09.5",
        "60 6 6 0.125\t",
        "0\t6\t6\t0.125\t1\t0:00:09.5",
    ],
)
def test_a_wrong_last_line_is_still_an_error(tmp_path: Path, last: str) -> None:
    path = tmp_path / "log.tsv"
    path.write_text(GOOD.read_text() + last)
    with pytest.raises(LogError, match="line 5"):
        read_log(path)


def test_a_half_line_that_is_not_the_last_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_text(GOOD.read_text() + "60\t6\t6\n")
    with pytest.raises(LogError, match="line 5: expected 6 fields separated by tabs, found 3"):
        read_log(path)
