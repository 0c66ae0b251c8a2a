"""A log becomes statements about its data set: as often true as they say, and refused where nothing supports them.

Each test of 1,000 audits raises a false alarm with probability below 1e-6. The images that are not good have a true
radius just below r, so that each gets a false certificate with a probability as near alpha as its votes allow.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from pages import ROOT, blocks
from scipy.stats import binom, norm

from macer_serve.cli import main
from macer_serve.errors import LogError, ParameterError
from macer_serve.evaluation.audit import audit, delta_of
from macer_serve.evaluation.logs import ABSTAINED, UNDECODABLE, Log, LogWriter, Row
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.noise import STREAMS

AUDITS, ALPHA, DELTA, IMAGES, VOTES, R = 1000, 0.01, 0.01, 200, 1000, 0.25
EDGE = float(norm.cdf(R / 0.25))  # the top class's probability at which the true radius is exactly r
NEEDED = next(k for k in range(VOTES + 1) if k and clopper_pearson_lower(k, VOTES, ALPHA) >= EDGE)
MOST_FALSE = int(binom.isf(1e-6, AUDITS, DELTA))
SETTINGS: dict[str, Any] = {
    "checkpoint": "sha256:" + 64 * "0", "dataset": "cifar10", "start": 0, "stop": IMAGES, "every": 1,
    "sigma": 0.25, "alpha": ALPHA, "noise": STREAMS["exact"].name, "seed": "an auditor's",
}  # fmt: skip


def row(idx: int, certified: bool) -> Row:
    return Row(idx, 3, 3, R if certified else 0.1, True, 0.0, input_digest=f"sha256:{idx:064x}")


ROWS = {certified: [row(idx, certified) for idx in range(IMAGES)] for certified in (True, False)}


def log_of(certified: Any, **settings: Any) -> Log:
    """Returns the log of a run in which these images were certified at R."""
    rows = tuple(ROWS[bool(one)][idx] for idx, one in enumerate(certified))
    return Log(rows, {**SETTINGS, "stop": len(rows), **settings})


def run(rng: np.random.Generator, good: int) -> Log:
    """Returns the log of a run on IMAGES images: the good ones have votes to spare, the others lie at the edge."""
    p = np.where(np.arange(IMAGES) < good, 0.99, EDGE)
    return log_of(rng.permuted(rng.binomial(VOTES, p) >= NEEDED))


@pytest.mark.parametrize("share", [0.0, 0.6, 0.95])
def test_statements_of_a_thousand_audits_are_true(share: float) -> None:
    rng = np.random.default_rng(int(100 * share) + 3)
    goods = rng.binomial(IMAGES, share, AUDITS)
    audits = [audit([run(rng, int(good))], R, DELTA) for good in goods]
    slack = [int(good) - a.good for good, a in zip(goods, audits, strict=True)]
    of_share = [share - float(a.share or 0.0) for a in audits]
    print(f"share {share}: false {sum(s < 0 for s in slack)} and {sum(s < 0 for s in of_share)} of {AUDITS:,}")
    print(f"median slack {np.median(slack):.0f} of {IMAGES} images, and {np.median(of_share):.4f} of the population")
    assert sum(s < 0 for s in slack) <= MOST_FALSE
    assert sum(s < 0 for s in of_share) <= MOST_FALSE
    assert np.median(slack) <= 0.03 * IMAGES
    assert np.median(of_share) <= 0.1
    false = sum(a.certified > good for good, a in zip(goods, audits, strict=True))
    assert false > MOST_FALSE or share == 0.95, "the count itself, in place of the bound, must be caught"


@pytest.mark.parametrize("population", [IMAGES, 1000])
def test_statements_about_a_finite_population_are_true(population: int) -> None:
    rng = np.random.default_rng(population)
    truth = population * 3 // 4
    goods = rng.hypergeometric(truth, population - truth, IMAGES, AUDITS)
    bounds = [audit([run(rng, int(good))], R, DELTA, population=population).good_in_population for good in goods]
    slack = [truth - int(bound or 0) for bound in bounds]
    print(f"population {population}: false {sum(s < 0 for s in slack)}, median slack {np.median(slack):.0f}")
    assert sum(s < 0 for s in slack) <= MOST_FALSE
    assert np.median(slack) <= 0.1 * population


# What supports no statement


def changed_row(log: Log, at: int, **changes: Any) -> Log:
    rows = list(log.rows)
    rows[at] = dataclasses.replace(rows[at], **changes)
    return dataclasses.replace(log, rows=tuple(rows))


GOOD = log_of([True] * 20)


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        ([changed_row(GOOD, 3, input_digest=ROWS[True][7].input_digest)], "images 3 and 7 are the same model input"),
        ([dataclasses.replace(GOOD, rows=GOOD.rows[:-2])], "2 of its 20 images are missing, the first is image 18"),
        ([dataclasses.replace(GOOD, rows=())], "20 of its 20 images are missing"),
        ([log_of([True] * 20, stop=19)], "image 19 is not one of those"),
        ([log_of([True] * 20, every=2)], "image 1 is not one of those"),
        ([dataclasses.replace(GOOD, settings={})], "settings lack checkpoint, dataset, alpha, noise, start"),
        ([changed_row(GOOD, 3, input_digest=None)], "no input digests"),
        ([GOOD, GOOD], "image 0 is in two of the logs"),
        ([GOOD, log_of([True], alpha=0.001)], "alpha is 0.01 in the one and 0.001 in the other"),
        ([GOOD, log_of([True], seed="another")], "seed is an auditor's in the one"),
        ([GOOD, log_of([True], radius=0.25)], "radius is absent in the one"),
        ([log_of([True], noise="invented")], "noise or its alpha is unknown"),
    ],
)
def test_logs_that_support_no_statement_are_refused(logs: list[Log], words: str) -> None:
    with pytest.raises(LogError, match=words):
        audit(logs, R, DELTA)


def test_parts_of_one_run_are_one_data_set() -> None:
    parts = [dataclasses.replace(GOOD, rows=GOOD.rows[a:b], settings={**GOOD.settings, "start": a, "stop": b})
             for a, b in ((0, 5), (5, 20))]  # fmt: skip
    assert audit(parts, R, DELTA) == audit([GOOD], R, DELTA)


def test_every_row_counts() -> None:
    one = changed_row(GOOD, 0, predict=ABSTAINED, radius=0.0, correct=False, input_digest=UNDECODABLE)
    two = changed_row(one, 1, predict=ABSTAINED, radius=0.0, correct=False, input_digest=UNDECODABLE)
    wrong = changed_row(two, 2, label=5, correct=False)
    less = changed_row(wrong, 3, radius=0.249999)
    found = audit([less], R, DELTA)
    assert (found.images, found.certified, found.undecodable) == (20, 16, 2)
    assert "2 of them undecodable" in found.to_text()


def test_values_out_of_range_are_refused() -> None:
    for radius in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ParameterError, match="radius"):
            audit([GOOD], radius, DELTA)
    with pytest.raises(ParameterError, match="population of 19"):
        audit([GOOD], R, DELTA, population=19)
    for confidence in ("0.5", "1", "99", "nan", "x", "-1"):
        with pytest.raises(ParameterError, match="strictly between"):
            delta_of(confidence)
    assert delta_of("0.99") == 0.01


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, 'seed "an auditor\'s", which the evaluator chose'),
        ({"seed": "0"}, "choose another one"),
        ({"key_id": "abc"}, "issuer's key abc, which was published before"),
        ({"noise": STREAMS["gaussian"].name}, str(STREAMS["gaussian"].caveat)),
        ({"bound": "soft"}, "the soft smoothed classifier"),
    ],
)
def test_the_sentences_say_what_they_rest_on(settings: dict[str, Any], said: str) -> None:
    log = log_of([True] * 20, **settings)
    text = audit([log], R, DELTA).to_text()
    assert said in text
    assert "was fixed before the noise was drawn" in text
    assert "With confidence 99%" in text


# The command


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Log], Path]:
    def write(log: Log) -> Path:
        path = tmp_path / "log.tsv"
        with LogWriter.open(path, log.settings) as writer:
            for one in log.rows:
                writer.write(one)
        return path

    return write


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_command_prints_statements_figures_and_assumptions(file: Callable[[Log], Path]) -> None:
    path = file(log_of([True] * 18 + [False] * 2))
    result = report(path, "--statement", "r=0.25", "--confidence", "0.99")
    assert result.exit_code == 0, result.output
    found = audit([log_of([True] * 18 + [False] * 2)], R, 0.01)
    assert f"at least {found.good} of these 20 images" in result.stdout
    assert [line for line in result.stdout.splitlines() if line.endswith(":") and line[0] != " "] == [
        "Of these images:", "Of the population:", "Figures:", "Assumed:",
    ]  # fmt: skip
    data = json.loads(report(path, "--statement", "0.25", "--population", 500, "--format", "json").stdout)
    assert (data["good"], data["certified"], data["images"], data["share"]) == (found.good, 18, 20, None)
    assert "of the 500 images" in data["statements"][1]


def test_the_command_refuses(file: Callable[[Log], Path]) -> None:
    path = file(GOOD)
    assert report(path, "--statement", "r=0.25", "--range", "0:5").exit_code == 2
    assert report(path, "--statement", "wide").exit_code == 2
    assert report(path, "--statement", "r=0.25", "--confidence", "0.4").exit_code == 2
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    result = report(path, "--statement", "r=0.25")
    assert result.exit_code == 5
    assert "1 of its 20 images are missing" in result.output
    cohen = Path(__file__).parent / "logs" / "good.tsv"
    result = report(cohen, "--statement", "r=0.25")
    assert result.exit_code == 5
    assert "supports no statement" in result.output


def test_the_page_shows_what_the_command_prints() -> None:
    log = ROOT / "results" / "bundled" / "statement-every20-radius0.25.tsv"
    (shown,) = blocks(ROOT / "docs" / "statements.md", "text")
    assert shown.split() == report(log, "--statement", "r=0.25", "--confidence", "0.99").stdout.split()
