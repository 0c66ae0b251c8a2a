"""`macer verify` says what holds and what does not, by its words and by its exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.cli.exit_codes import VERDICTS
from macer_serve.issuing import Issuer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw
from macer_serve.verification import Verdict
from macer_serve.voters import VoterOptions
from macer_serve.voters.batched import BatchedVoter

IMAGES = Path(__file__).parents[1] / "images"
SHIP = IMAGES / "0001-ship.png"


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `issuer.key`, `issuer.jwks`, and `ship.json`: the bundled checkpoint's certificate of an image."""
    folder = tmp_path_factory.mktemp("issued")
    issuer = Issuer.new()
    issuer.save(folder / "issuer.key")
    (folder / "issuer.jwks").write_text(issuer.keys.to_json())
    options = VoterOptions(engine="torch", device="cpu", batch=64, workers=2, precision="fp32", compile=False)
    g = SmoothedClassifier.load("bundled:cifar10", issuer=issuer, options=options)
    c = g.certify(SHIP, Plan(n0=30, n=400, tolerance=0.3))
    assert isinstance(g.voter, BatchedVoter)
    g.voter.close()
    (folder / "ship.json").write_text(
        json.dumps({"certificate": c.to_json(), "certificate_jws": g.signed(c)}, indent=2)
    )
    return folder


def macer(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def edited(folder: Path, **changes: Any) -> Path:
    document = json.loads((folder / "ship.json").read_text())
    document["certificate"] |= changes
    path = folder / "edited.json"
    path.write_text(json.dumps(document))
    return path


def test_every_verdict_has_an_exit_code_and_a_paragraph() -> None:
    assert set(VERDICTS) == {verdict.value for verdict in Verdict}
    assert len(set(VERDICTS.values())) == len(VERDICTS)
    for verdict in Verdict:
        assert verdict.paragraph.endswith(".")
        assert verdict.refutes == (10 <= VERDICTS[verdict.value] < 20)


def test_the_command_on_an_honest_certificate(issued: Path) -> None:
    result = macer(issued / "ship.json", SHIP, "--key", issued / "issuer.jwks")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "proved"), result.output
    assert "votes counted again" not in result.stdout  # only what does not hold, unless asked
    result = macer(issued / "ship.json", SHIP, "--key", issued / "issuer.jwks", "--verbose")
    assert "holds          votes counted again: 130 votes, identical" in result.stdout
    result = macer(issued / "ship.json", SHIP, "--key", issued / "issuer.jwks", "--no-recount")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (20, "consistent")
    assert "not checked    votes counted again" in result.stdout
    result = macer(issued / "ship.json", SHIP, "--no-recount", "--json")
    assert result.exit_code == 23, result.output
    report = json.loads(result.stdout)
    assert report["verdict"] == "not authenticated"
    assert report["not_checked"] == ["signature", "seed_proof", "votes counted again"]


def test_predict_writes_what_verify_proves(issued: Path, tmp_path: Path) -> None:
    """The two commands agree on engine and form, in processes of their own or not."""
    options = ["--n", "400", "--key", str(issued / "issuer.key"), "--json"]
    result = CliRunner().invoke(main, ["predict", str(SHIP), *options])
    assert result.exit_code == 0, result.output
    (tmp_path / "ship.json").write_text(result.stdout)
    result = macer(tmp_path / "ship.json", SHIP, "--key", issued / "issuer.jwks")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "proved"), result.output


def test_the_commands_exit_codes(issued: Path, tmp_path: Path) -> None:
    config = load_config("bundled:cifar10")
    key = ["--key", issued / "issuer.jwks"]
    cases: list[tuple[list[object], int, str]] = [
        ([edited(issued, radius=3.0), SHIP, *key], 10, "radius, beside the signature"),
        ([issued / "ship.json", IMAGES / "0000-cat.png", *key], 11, "input.digest"),
    ]
    for arguments, code, words in cases:
        result = macer(*arguments)
        assert result.exit_code == code, result.output
        assert words in result.stdout
    (tmp_path / "other.jwks").write_text(Issuer.new().keys.to_json())
    result = macer(issued / "ship.json", SHIP, "--key", tmp_path / "other.jwks")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (13, "issued under another key")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config.to_json(), "sigma": 0.5}))
    assert macer(issued / "ship.json", SHIP, *key, "--checkpoint", other).exit_code == 11


def test_the_command_on_a_lie_that_is_consistent(issued: Path) -> None:
    engine = json.loads((issued / "ship.json").read_text())["certificate"]["engine"]
    liar = SmoothedClassifier(load_config("bundled:cifar10"), issuer=Issuer.load(issued / "issuer.key"))
    model_input, plan = liar.model_input(SHIP), Plan(n0=30, n=1000)
    run = liar.certification(model_input, plan)
    while isinstance(want := run.wants(), Draw):
        run.add(want, np.eye(10, dtype=np.int64)[3] * len(want))
    c = liar.certificate(model_input, run, liar.seed_proof(model_input, plan), engine)
    (issued / "lie.json").write_text(json.dumps({"certificate": c.to_json(), "certificate_jws": liar.signed(c)}))
    result = macer(issued / "lie.json", SHIP, "--key", issued / "issuer.jwks")
    assert result.exit_code == 12, result.output
    assert result.stdout.splitlines()[0] == "contradicted"
    assert "does not hold  votes counted again: " in result.stdout


def test_a_folder_of_certificates(issued: Path, tmp_path: Path) -> None:
    certificates, images = tmp_path / "certificates", tmp_path / "images"
    certificates.mkdir()
    images.mkdir()
    for name, picture in (("a", SHIP), ("b", SHIP), ("c", IMAGES / "0000-cat.png")):
        shutil.copy(issued / "ship.json", certificates / f"{name}.json")
        shutil.copy(picture, images / f"{name}.png")
    result = macer(certificates, images, "--key", issued / "issuer.jwks")
    assert result.exit_code == 11, result.output
    assert result.stdout.splitlines()[-1] == "2 proved, 1 about another image or checkpoint"
    (certificates / "d.json").write_text("{}")
    shutil.copy(SHIP, images / "d.png")
    result = macer(certificates, images, "--key", issued / "issuer.jwks", "--no-recount", "--json")
    assert result.exit_code == 14
    rows = [json.loads(line)["verdict"] for line in result.stdout.splitlines()]
    assert rows == ["consistent", "consistent", "about another image or checkpoint", "not readable"]
    (images / "d.png").unlink()
    assert macer(certificates, images).exit_code == 2
    assert macer(certificates, SHIP).exit_code == 2


def test_the_command_on_what_cannot_be_read(issued: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.json"
    junk.write_bytes(b"[" * 100_000)
    good = issued / "ship.json"
    assert macer(junk, SHIP).exit_code == 14
    assert macer(tmp_path / "absent.json", SHIP).exit_code == 2
    older = {**json.loads(good.read_text())["certificate"], "mac": "hmac-sha256:00"}
    (tmp_path / "older.json").write_text(json.dumps(older))
    result = macer(tmp_path / "older.json", SHIP)
    assert result.exit_code == 14
    assert "older form" in result.stdout
    assert macer(good, tmp_path / "absent.png").exit_code == 8
    assert macer(good, good).exit_code == 8
    assert macer(good, SHIP, "--checkpoint", "nowhere").exit_code == 3
    assert macer(good, SHIP, "--device", "tpu").exit_code == 2
    assert macer(good, SHIP, "--key", junk).exit_code == 17


def test_a_batch_that_is_too_large_is_refused_and_said(tmp_path: Path) -> None:
    """The issuer is honest and has more memory. The auditor is told why the votes need not be identical."""
    issuer = Issuer.new()
    (tmp_path / "issuer.jwks").write_text(issuer.keys.to_json())
    options = VoterOptions(engine="torch", device="cpu", batch=1100, workers=1, precision="fp32", compile=False)
    g = SmoothedClassifier.load("bundled:cifar10", issuer=issuer, options=options)
    c = g.certify(SHIP, Plan(n0=20, n=100))
    assert isinstance(g.voter, BatchedVoter)
    g.voter.close()
    assert "-b1100:" in c.engine
    (tmp_path / "ship.json").write_text(json.dumps({"certificate": c.to_json(), "certificate_jws": g.signed(c)}))
    result = macer(tmp_path / "ship.json", SHIP, "--key", tmp_path / "issuer.jwks", "--json")
    assert result.exit_code == 21, result.output
    found = {f["check"]: f for f in json.loads(result.stdout)["findings"]}
    assert found["votes counted again"]["outcome"] == "not checked"
    assert "its batch of 1,100 copies is refused: at most 1,024 copies" in found["votes counted again"]["words"]
    assert "-b256:" in found["votes counted again"]["words"]
