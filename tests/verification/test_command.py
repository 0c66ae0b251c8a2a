"""`macer verify` says what holds and what does not, by its words and by its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brightness import SECRET
from click.testing import CliRunner, Result

from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import VoterOptions
from macer_serve.voters.batched import BatchedVoter

IMAGES = Path(__file__).parents[1] / "images"
SHIP = IMAGES / "0001-ship.png"


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `secret` and `ship.json`: the bundled checkpoint's certificate of a photograph."""
    folder = tmp_path_factory.mktemp("issued")
    (folder / "secret").write_bytes(SECRET.hex().encode() + b"\n")
    options = VoterOptions(engine="torch", device="cpu", batch=64, workers=2, precision="fp32", compile=False)
    g = SmoothedClassifier.load("bundled:cifar10", secret=SECRET.hex().encode(), options=options)
    c = g.certify(SHIP, Plan(n0=30, n=400, tolerance=0.3))
    assert isinstance(g.voter, BatchedVoter)
    g.voter.close()
    (folder / "ship.json").write_text(json.dumps(c.to_json(), indent=2))
    return folder


def macer(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


def edited(folder: Path, **changes: Any) -> Path:
    record = {**json.loads((folder / "ship.json").read_text()), **changes}
    path = folder / "edited.json"
    path.write_text(json.dumps(record))
    return path


def test_the_command_on_an_honest_certificate(issued: Path) -> None:
    result = macer(issued / "ship.json", SHIP, "--secret-file", issued / "secret")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "everything that was checked holds"
    assert "holds          mac: " in result.stdout
    assert "holds          votes counted again: " in result.stdout
    result = macer(issued / "ship.json", SHIP, "--votes", 300, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["holds"], report["exit_code"]) == (True, 0)
    assert {f["check"]: f["outcome"] for f in report["findings"]}["fresh votes"] == "holds"


def test_the_commands_exit_codes(issued: Path, tmp_path: Path) -> None:
    config = load_config("bundled:cifar10")
    cases: list[tuple[list[object], int, str]] = [
        ([edited(issued, radius=3.0), SHIP], 10, "forged: radius"),
        ([issued / "ship.json", IMAGES / "0000-cat.png"], 11, "input.digest"),
    ]
    for arguments, code, words in cases:
        result = macer(*arguments)
        assert result.exit_code == code, result.output
        assert words in result.stderr
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"another secret of some length")
    result = macer(issued / "ship.json", SHIP, "--secret-file", wrong)
    assert result.exit_code == 10
    assert "mac, votes counted again" in result.stderr
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config.to_json(), "name": "other"}))
    assert macer(issued / "ship.json", SHIP, "--checkpoint", other).exit_code == 11


def test_the_command_on_a_forgery_that_is_consistent(issued: Path) -> None:
    c = Certificate.from_json(json.loads((issued / "ship.json").read_text()))
    forger = SmoothedClassifier(load_config("bundled:cifar10"))
    question = forger.question(SHIP)
    run = forger.certification(question, Plan(n0=30, n=1000))
    while isinstance(want := run.wants(), Draw):
        run.add(want, np.eye(10, dtype=np.int64)[8] * len(want))
    (issued / "forged.json").write_text(json.dumps(forger.certificate(question, run, c.engine).to_json()))
    result = macer(issued / "forged.json", SHIP, "--votes", 1000)
    assert result.exit_code == 12, result.output
    assert "does not hold  fresh votes: " in result.stdout
    assert "contradicted by fresh votes" in result.stderr


def test_the_command_on_what_cannot_be_read(issued: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.json"
    junk.write_bytes(b"[" * 100_000)
    good = issued / "ship.json"
    assert macer(junk, SHIP).exit_code == 2
    assert macer(tmp_path / "absent.json", SHIP).exit_code == 2
    assert macer(good, tmp_path / "absent.png").exit_code == 8
    assert macer(good, good).exit_code == 8
    assert macer(good, SHIP, "--checkpoint", "nowhere").exit_code == 3
    assert macer(good, SHIP, "--device", "tpu").exit_code == 2
    assert macer(good, SHIP, "--votes", -1).exit_code == 2
    short = tmp_path / "short"
    short.write_bytes(b"short")
    assert macer(good, SHIP, "--secret-file", short).exit_code == 2


def test_a_batch_that_is_too_large_is_refused_and_said(tmp_path: Path) -> None:
    """The issuer is honest and has more memory; the auditor is told why the votes are not counted again."""
    secret = SECRET.hex().encode()
    (tmp_path / "secret").write_bytes(secret)
    options = VoterOptions(engine="torch", device="cpu", batch=1100, workers=1, precision="fp32", compile=False)
    g = SmoothedClassifier.load("bundled:cifar10", secret=secret, options=options)
    c = g.certify(SHIP, Plan(n0=20, n=100))
    assert isinstance(g.voter, BatchedVoter)
    g.voter.close()
    assert "-b1100:" in c.engine
    (tmp_path / "ship.json").write_text(json.dumps(c.to_json()))
    result = macer(tmp_path / "ship.json", SHIP, "--secret-file", tmp_path / "secret", "--votes", 100, "--json")
    assert result.exit_code == 0, result.output
    found = {f["check"]: f for f in json.loads(result.stdout)["findings"]}
    assert found["votes counted again"]["outcome"] == "not checked"
    assert "its batch of 1,100 copies is refused: at most 1,024 copies" in found["votes counted again"]["words"]
    assert "-b256:" in found["votes counted again"]["words"]
    assert found["fresh votes"]["outcome"] == "holds"
