"""A log is read exactly or refused with its line, and a killed run continues where its last complete line ends."""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macer_serve.errors import LogError, ParameterError
from macer_serve.evaluation.logs import UNDECODABLE, LogWriter, Row, read_log

COHEN_HEAD = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
EARLIER_HEAD = COHEN_HEAD[:-1] + "\tp_lower\tn\tcount_a\ttop\n"
OUR_HEAD = EARLIER_HEAD[:-1] + "\tinput_digest\tlevel\tgroup\tgroup_radius\tgroup_correct\n"
DIGEST = "sha256:" + 64 * "3"
COHEN_LOG = COHEN_HEAD + "0\t3\t3\t0.502\t1\t0:00:13.126220\n7\t8\t-1\t0.0\t0\t0:00:14.000001\n"
SETTINGS = {"dataset": "cifar10", "sigma": 0.25, "checkpoint": "sha256:9f3a", "n": 1000, "data": "a b: c"}
FIRST = Row(0, 3, 3, 0.502113, True, 0.412903, 0.977683112, 100_000, 97_912, 3, DIGEST)
ABSTAINED = Row(20, 8, -1, 0.0, False, 0.5, 0.25, 1_000, 300, 2)
REFUSED = Row(60, 2, -1, 0.0, False, 0.25, input_digest=UNDECODABLE)
COARSE = Row(
    80, 2, -1, 0.0, False, 0.25, n=1000, count_a=400, top=2,
    level=1, group="an animal", group_radius=0.31, group_correct=True,
)  # fmt: skip
Write = Callable[[str], Path]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "log.tsv"
        path.write_bytes(text.encode())
        return path

    return write


def test_cohens_log(written: Write) -> None:
    log = read_log(written(COHEN_LOG))
    assert log.rows == (Row(0, 3, 3, 0.502, True, 13.12622), Row(7, 8, -1, 0.0, False, 14.000001))
    assert log.settings == {}
    assert log.radius_decimals == 3


@pytest.mark.parametrize("name", ["log.tsv", "log.gz", "log"])
def test_gzip_is_recognised_by_its_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(COHEN_LOG.encode()))
    assert len(read_log(tmp_path / name).rows) == 2


@pytest.mark.parametrize("text", [COHEN_LOG[:-1], COHEN_LOG + "\n\n", COHEN_LOG.replace("\n", "\r\n")])
def test_foreign_line_ends(written: Write, text: str) -> None:
    assert len(read_log(written(text)).rows) == 2


def test_unknown_columns_are_skipped(written: Write) -> None:
    log = read_log(written(COHEN_HEAD[:-1] + "\tp_lower\tnote\n" + "0\t3\t3\t0.5\t1\t1.5\t0.97\thello\n"))
    assert log.rows == (Row(0, 3, 3, 0.5, True, 1.5, 0.97),)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00:14.172309", 14.172309),
        ("0:02:17", 137.0),
        ("25:00:00.5", 90000.5),
        ("1 day, 0:00:01", 86401.0),
        ("12 days, 23:59:59.000001", 12 * 86400 + 86399.000001),
        ("3.25", 3.25),
        ("1e-3", 0.001),
    ],
)
def test_times(written: Write, text: str, seconds: float) -> None:
    assert read_log(written(COHEN_HEAD + f"0\t3\t3\t0.5\t1\t{text}\n")).rows[0].seconds == seconds


@pytest.mark.parametrize(
    ("radii", "decimals"),
    [(["0.953", "0.48", "0.000864"], 2), (["1.0", "8.64e-05"], 1), (["0.953812", "0.000001"], 6), ([], None)],
)
def test_printed_decimals(written: Write, radii: list[str], decimals: int | None) -> None:
    rows = [f"{idx}\t1\t1\t{radius}\t1\t1.0\n" for idx, radius in enumerate(radii)]
    assert read_log(written(COHEN_HEAD + "".join(rows))).radius_decimals == decimals


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("1\t3\t3\t0.5\t1", "expected 6 fields separated by tabs, found 5"),
        ("1_0\t3\t3\t0.5\t1\t1.0", "idx must be an integer"),
        ("-1\t3\t3\t0.5\t1\t1.0", "must be 0 or more"),
        ("1\t3\t-2\t0.0\t0\t1.0", "predict -1 or more"),
        ("1\t3\t3\tnan\t1\t1.0", "radius must be a finite number"),
        ("1\t3\t3\t1e999\t1\t1.0", "radius must be a finite number"),
        ("1\t3\t3\t-0.5\t1\t1.0", "radius must be a finite number"),
        ("1\t3\t-1\t0.5\t0\t1.0", "an abstention .* has radius 0"),
        ("1\t3\t3\t0.5\ttrue\t1.0", "correct must be 0 or 1"),
        ("1\t3\t3\t0.5\t0\t1.0", "whether predict equals label"),
        ("1\t3\t3\t0.5\t1\t0:60:00", "time must be"),
        ("1\t3\t3\t0.5\t1\tnan", "time must be"),
        ("0\t3\t3\t0.5\t1\t1.0", "image 0 is in the log already"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(written: Write, row: str, complaint: str) -> None:
    good = "0\t3\t3\t0.5\t1\t1.0\n"
    path = written(COHEN_HEAD + good + row + "\n" + good.replace("0", "2", 1))
    with pytest.raises(LogError, match=complaint) as raised:
        read_log(path)
    assert str(raised.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    ("ours", "complaint"),
    [
        ("1.5\t10\t9\t3", "p_lower must lie"),
        ("0.5\t10\t11\t3", "count_a must be at most n"),
        ("0.5\t-1\t\t3", "must be 0 or more"),
        ("0.5\t10\t9\t4", "predict must be -1 or top"),
    ],
)
def test_our_columns_are_checked_too(written: Write, ours: str, complaint: str) -> None:
    with pytest.raises(LogError, match=complaint):
        read_log(written(EARLIER_HEAD + f"1\t3\t3\t0.5\t1\t1.0\t{ours}\n"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello\n",
        b"\x89PNG\r\n\x1a\n\x00\xff",
        b"# only: settings\n",
        b"# a: 1\n# a: 2\n" + COHEN_HEAD.encode(),
        COHEN_HEAD.replace("\t", " ").encode(),
        COHEN_HEAD.replace("time", "time\ttime").encode(),
        b"\x1f\x8bnot really gzip",
        gzip.compress(COHEN_LOG.encode(), mtime=0)[:-9],
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(LogError, match="file"):
        read_log(path)


def test_a_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="directory"):
        read_log(tmp_path)


def test_the_file_is_what_the_format_says(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.tsv"
    with LogWriter.open(path, SETTINGS) as log:
        assert log.rows == ()
        log.write(FIRST)
        log.write(ABSTAINED)
        log.write(Row(40, 1, 1, 0.0, True, 3.0))
        log.write(REFUSED)
        log.write(COARSE)
    assert path.read_text() == (
        OUR_HEAD
        + "0\t3\t3\t0.502113\t1\t0:00:00.412903\t0.977683112\t100000\t97912\t3\t"
        + DIGEST
        + "\t\t\t\t\n"
        + "20\t8\t-1\t0.000000\t0\t0:00:00.500000\t0.250000000\t1000\t300\t2\t\t\t\t\t\n"
        + "40\t1\t1\t0.000000\t1\t0:00:03\t\t\t\t\t\t\t\t\t\n"
        + "60\t2\t-1\t0.000000\t0\t0:00:00.250000\t\t\t\t\tundecodable\t\t\t\t\n"
        + "80\t2\t-1\t0.000000\t0\t0:00:00.250000\t\t1000\t400\t2\t\t1\tan animal\t0.310000\t1\n"
    )
    read = read_log(path)
    assert read.rows == (FIRST, ABSTAINED, Row(40, 1, 1, 0.0, True, 3.0), REFUSED, COARSE)
    assert read.notes == (f"{path}: images that could not be decoded count as abstentions: 1",)
    assert read.settings == SETTINGS
    assert read.radius_decimals == 6
    beside = path.with_name("log.tsv.json")
    assert json.loads(beside.read_text()) == {"log": 1, "settings": SETTINGS}
    assert sorted(path.parent.iterdir()) == [path, beside]


def test_a_log_without_settings_beside_it_has_none(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    LogWriter.open(path, SETTINGS).close()
    path.with_name("log.tsv.json").unlink()
    assert read_log(path).settings == {}
    with pytest.raises(LogError, match=r"log\.tsv\.json, which holds the settings of .*log\.tsv, is missing"):
        LogWriter.open(path, SETTINGS)


def test_a_compressed_log_has_the_settings_of_the_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    with LogWriter.open(path, SETTINGS) as log:
        log.write(FIRST)
    (tmp_path / "log.tsv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_log(tmp_path / "log.tsv.gz").settings == SETTINGS
    (tmp_path / "log.tsv.gz.json").write_text('{"log": 1, "settings": {"sigma": 1.0}}')
    assert read_log(tmp_path / "log.tsv.gz").settings == {"sigma": 1.0}, "its own come first"


OLD_LOG = "# dataset: cifar10\n# data: a b: c\n" + EARLIER_HEAD + "0\t3\t3\t0.502113\t1\t0:00:01\t0.97\t100\t99\t3\n"


def test_logs_of_earlier_versions_are_read_and_not_continued(written: Write) -> None:
    path = written(OLD_LOG)
    assert read_log(path).settings == {"dataset": "cifar10", "data": "a b: c"}
    assert [row.radius for row in read_log(path).rows] == [0.502113]
    with pytest.raises(LogError, match="written by an earlier version"):
        LogWriter.open(path, {"dataset": "cifar10", "data": "a b: c"})
    assert path.read_text() == OLD_LOG
    assert not path.with_name("log.tsv.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"name": "my own notes"}',
        b'{"log": 2, "settings": {}}',
        b'{"log": 1}',
        b'{"log": 1, "settings": [1]}',
        b'{"log": 1, "settings": {"sigma": null}}',
        b'{"log": 1, "settings": {"sigma": NaN}}',
        b'{"log": 1, "settings": {"sigma": [0.25]}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b" " * (2**20 + 1),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_another_file_in_the_settings_place_is_named_and_never_overwritten(tmp_path: Path, content: bytes) -> None:
    beside = tmp_path / "log.tsv.json"
    beside.write_bytes(content)
    with pytest.raises(LogError, match=r"log\.tsv\.json does not hold the settings"):
        LogWriter.open(tmp_path / "log.tsv", SETTINGS)
    (tmp_path / "log.tsv").write_text(OUR_HEAD)
    with pytest.raises(LogError, match=r"log\.tsv\.json does not hold the settings"):
        read_log(tmp_path / "log.tsv")
    assert beside.read_bytes() == content


def test_settings_of_a_log_that_was_removed_do_not_bind_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    with LogWriter.open(path, SETTINGS) as log:
        log.write(FIRST)
    path.unlink()
    with LogWriter.open(path, {"sigma": 1.0}) as log:
        assert log.rows == ()
    assert read_log(path).settings == {"sigma": 1.0}


def test_every_prefix_of_a_log_is_continued_to_the_same_log(tmp_path: Path) -> None:
    """Killed after any byte: no complete row is lost, none is written twice, the end is the same."""
    path = tmp_path / "log.tsv"
    with LogWriter.open(path, SETTINGS) as log:
        log.write(FIRST)
        log.write(ABSTAINED)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with LogWriter.open(path, SETTINGS) as log:
            assert len(log.done) == len(log.rows) == max(0, whole[:size].count(b"\n") - 1)
            for row in (FIRST, ABSTAINED):
                if row.idx not in log.done:
                    log.write(row)
        assert path.read_bytes() == whole
        assert read_log(path).settings == SETTINGS


@pytest.mark.parametrize("written", ["nothing", "the settings", "half of the settings", "the settings and half a head"])
def test_a_run_killed_before_its_first_row_is_started_again(tmp_path: Path, written: str) -> None:
    path, beside = tmp_path / "log.tsv", tmp_path / "log.tsv.json"
    LogWriter.open(tmp_path / "other.tsv", {"sigma": 1.0}).close()
    text = (tmp_path / "other.tsv.json").read_text()
    path.write_text(OUR_HEAD[:20] if "head" in written else "")
    if written == "half of the settings":  # they are written under another name, and renamed
        (tmp_path / ".log.tsv.json.1").write_text(text[:20])
    elif written != "nothing":
        beside.write_text(text)
    with LogWriter.open(path, SETTINGS) as log:
        log.write(FIRST)
    assert (read_log(path).settings, read_log(path).rows) == (SETTINGS, (FIRST,))


def test_a_torn_last_line_is_not_read_either(written: Write) -> None:
    # Cut within its last field, the line still has every field: `top` 12 would be read as 1.
    torn = "4\t1\t-1\t0.000000\t0\t0:00:01\t0.100000000\t10\t2\t1"
    log = read_log(path := written(EARLIER_HEAD + torn))
    assert log.rows == ()
    assert log.notes == (f"the last line of {path} is not complete and is left out",)
    assert read_log(written(EARLIER_HEAD + torn + "2\n")).notes == ()
    assert len(read_log(written(EARLIER_HEAD + torn + "2\n")).rows) == 1
    assert len(read_log(written(EARLIER_HEAD + torn + "2\n\t")).rows) == 1
    assert len(read_log(written(EARLIER_HEAD + torn + "2\n\0\0")).rows) == 1


def test_other_settings_are_refused_by_name_and_the_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    LogWriter.open(path, SETTINGS).close()
    before = path.read_bytes() + b"torn"
    path.write_bytes(before)
    changed = {**SETTINGS, "sigma": 0.5, "seed": "1"}
    del changed["data"]
    with pytest.raises(LogError, match="choose another file for this log") as raised:
        LogWriter.open(path, changed)
    message = str(raised.value)
    assert "sigma (0.25 there, 0.5 now)" in message
    assert "seed (absent there, 1 now)" in message
    assert "data (a b: c there, absent now)" in message
    assert "checkpoint" not in message
    assert path.read_bytes() == before
    LogWriter.open(path, dict(reversed(SETTINGS.items()))).close()  # their order is no difference


@pytest.mark.parametrize("data", [COHEN_LOG.encode(), b"hello", b"hello\n", gzip.compress(COHEN_LOG.encode(), mtime=0)])
def test_a_file_that_is_not_ours_is_never_touched(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(LogError, match="file"):
        LogWriter.open(path, {})
    assert path.read_bytes() == data


def test_two_runs_cannot_write_one_log(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "log.tsv"
    with LogWriter.open(path, {}), pytest.raises(LogError, match=r"is being written by .*process"):
        LogWriter.open(path, {})
    LogWriter.open(path, {}).close()


def test_an_image_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    with LogWriter.open(path, {}) as log:
        log.write(FIRST)
        assert read_log(path).rows == (FIRST,)  # on disk before the next is computed
        with pytest.raises(LogError, match="image 0 is in the log already"):
            log.write(FIRST)


def test_a_radius_that_printing_would_round_is_refused(tmp_path: Path) -> None:
    with LogWriter.open(tmp_path / "log.tsv", {}) as log, pytest.raises(ParameterError, match="rounded down"):
        log.write(Row(0, 3, 3, 0.5021139, True, 1.0))


@pytest.mark.parametrize(
    "settings",
    [{"a": None}, {"a": True}, {"a": [1]}, {"a": math.nan}, {"a": -math.inf}, {1: "b"}, {"a": "\ud800"}, {"\udfff": 1}],
)
def test_settings_that_would_not_read_back_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="setting"):
        LogWriter.open(tmp_path / "log.tsv", settings)
    assert not list(tmp_path.iterdir())


@st.composite
def rows(draw: st.DrawFn) -> Row:
    label, top = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    predict = draw(st.sampled_from([-1, top]))
    n = draw(st.integers(0, 10**6))
    return Row(
        idx=draw(st.integers(0, 10**6)),
        label=label,
        predict=predict,
        radius=0.0 if predict == -1 else draw(st.integers(0, 10**7)) / 1e6,
        correct=predict == label,
        seconds=draw(st.integers(0, 10**15)) / 1e6,
        p_lower=draw(st.none() | st.floats(0.0, 1.0)),
        n=draw(st.sampled_from([None, n])),
        count_a=draw(st.none() | st.integers(0, n)),
        top=draw(st.sampled_from([None, top])),
        input_digest=draw(st.sampled_from([None, DIGEST])),
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = TEXT | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)  # a slow disk is no failure
@given(st.lists(rows(), max_size=5, unique_by=lambda row: row.idx), st.dictionaries(TEXT, VALUES, max_size=3))
def test_what_is_written_is_read_back(written_rows: list[Row], header: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.tsv"
        with LogWriter.open(path, header) as log:
            for row in written_rows:
                log.write(row)
        read = read_log(path)
        with LogWriter.open(path, header) as log:
            assert log.rows == read.rows
            assert log.done == {row.idx for row in written_rows}
        lines = path.read_bytes().decode().split("\n")[-1 - len(written_rows) : -1]
    assert read.settings == header
    for before, after, line in zip(written_rows, read.rows, lines, strict=True):
        for name in ("idx", "label", "predict", "radius", "correct", "seconds", "n", "count_a", "top"):
            assert getattr(before, name) == getattr(after, name)
        if before.p_lower is None:
            assert after.p_lower is None
        else:
            lost = Fraction(before.p_lower) - Fraction(line.split("\t")[6])
            assert 0 <= lost < Fraction(1, 10**9)
