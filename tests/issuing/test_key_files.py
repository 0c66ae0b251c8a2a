"""Key files and `macer key`: private files stay private, public ones hold what auditors need and nothing else."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import house
import pytest
from click.testing import CliRunner, Result

from macer_serve.cli import main
from macer_serve.errors import IssuerKeyError, OtherKeyError
from macer_serve.issuing import Issuer, IssuerKey, KeySet
from macer_serve.issuing.key_set import MAX_KEYS, PRIVATE_MEMBERS
from macer_serve.issuing.keys import PROOF, RETIRED


def macer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def key_file(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "issuer.key"
    issuer.save(path)
    return path


def keys_in(path: Path) -> list[dict[str, Any]]:
    keys: list[dict[str, Any]] = json.loads(path.read_text())["keys"]
    return keys


def test_a_key_file_is_its_owners_alone_and_makes_the_same_issuer(key_file: Path, issuer: Issuer) -> None:
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    again = Issuer.load(key_file)
    assert again.key == issuer.key
    assert again.sign(b"{}") == issuer.sign(b"{}")
    assert [path.name for path in key_file.parent.iterdir()] == ["issuer.key"]  # no unfinished file stays


def test_a_umask_does_not_widen_it(issuer: Issuer, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        issuer.save(tmp_path / "issuer.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "issuer.key").stat().st_mode) == 0o600


def test_an_existing_file_is_never_overwritten(issuer: Issuer, tmp_path: Path) -> None:
    path, link = tmp_path / "issuer.key", tmp_path / "link"
    path.write_text("precious")
    link.symlink_to(tmp_path / "nowhere")
    for taken in (path, link):
        with pytest.raises(IssuerKeyError, match="exists and is left as it is"):
            issuer.save(taken)
    assert path.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["issuer.key", "link"]
    with pytest.raises(IssuerKeyError, match="cannot be written"):
        issuer.save(tmp_path / "no folder" / "issuer.key")


def test_a_file_that_others_can_read_is_named(key_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "open.key"
    path.write_bytes(key_file.read_bytes())
    path.chmod(0o640)
    with caplog.at_level(logging.WARNING):
        Issuer.load(path)
    assert "chmod 600" in caplog.text
    caplog.clear()
    Issuer.load(key_file)
    assert not caplog.text


def test_no_text_of_an_issuer_shows_the_private_key(issuer: Issuer, key_file: Path) -> None:
    secret = [keys_in(key_file)[0][name] for name in PRIVATE_MEMBERS if name in keys_in(key_file)[0]]
    assert len(secret) == 6
    shown = repr(issuer) + str(issuer) + repr(issuer.key) + issuer.keys.to_json() + issuer.key.to_pem()
    assert not any(value in shown for value in secret)


def test_the_public_document_is_a_jwk_set_with_the_proof(issuer: Issuer, key_file: Path) -> None:
    [jwk] = json.loads(issuer.keys.to_json())["keys"]
    assert set(jwk) == {"kty", "use", "alg", "e", "kid", "n", PROOF}
    assert (jwk["kty"], jwk["e"], len(jwk[PROOF])) == ("RSA", "AQAB", 8)
    assert keys_in(key_file)[0].items() > jwk.items()
    assert KeySet.read(issuer.keys.to_json())[issuer.key.kid] == issuer.key


def test_a_published_private_key_is_refused(key_file: Path) -> None:
    with pytest.raises(IssuerKeyError, match="holds a private key"):
        KeySet.read(key_file.read_bytes())


def test_retired_keys_stay_in_the_key_set_marked(issuer: Issuer, other: Issuer, tmp_path: Path) -> None:
    present = Issuer(other._private, other.key, issuer.keys.retired())
    present.save(tmp_path / "issuer.key")
    again = Issuer.load(tmp_path / "issuer.key")
    assert (again.key, list(again.keys)) == (other.key, [other.key.kid, issuer.key.kid])
    assert again.keys.to_json() == present.keys.to_json()
    old = issuer.sign(b"{}")
    signed = KeySet.read(again.keys.to_json()).open(old)
    assert (signed.payload, signed.key.retired, signed.key.n) == (b"{}", True, issuer.key.n)
    assert not again.keys.open(again.sign(b"{}")).key.retired
    with pytest.raises(IssuerKeyError, match="retired key signs nothing"):
        Issuer(issuer._private, IssuerKey(issuer.key.n, issuer.key.proof, retired=True), [])
    with pytest.raises(IssuerKeyError, match="not that of the public key"):
        Issuer(issuer._private, other.key, [])


def changed(path: Path, **members: object) -> str:
    keys = keys_in(path)
    keys[0] = {name: value for name, value in {**keys[0], **members}.items() if value is not None}
    return json.dumps({"keys": keys})


def test_damaged_key_files_are_refused(key_file: Path, other: Issuer) -> None:
    text, jwk = key_file.read_text(), keys_in(key_file)[0]
    broken = {
        "empty": "",
        "cut": text[: len(text) // 2],
        "public": json.dumps({"keys": [other.key.to_jwk()]}),
        "two private keys": json.dumps({"keys": [jwk, jwk]}),
        "a second key that is not retired": json.dumps({"keys": [jwk, other.key.to_jwk()]}),
        "a second key that is no key": json.dumps({"keys": [jwk, {"kid": "A" * 43, RETIRED: True}]}),
        "retired": changed(key_file, **{RETIRED: True}),
        "no proof": changed(key_file, **{PROOF: None}),
        "proof of another key": changed(key_file, **{PROOF: other.key.to_jwk()[PROOF]}),
        "modulus of another key": changed(key_file, n=other.key.to_jwk()["n"], kid=other.key.kid),
        "another key's public part": changed(key_file, **other.key.to_jwk()),
        **{
            f"{name} swapped": changed(key_file, **{name: jwk["q" if name == "p" else "p"]})
            for name in ("d", "p", "q", "dp", "qi")
        },
        **{
            f"{name} missing": changed(key_file, **{name: None}) for name in ("d", "p", "q", "dp", "dq", "qi", "n", "e")
        },
        **{f"{name} is 1": changed(key_file, **{name: "AQ"}) for name in ("d", "p", "q", "dp", "dq", "qi", "n")},
    }
    for name, document in broken.items():
        with pytest.raises(IssuerKeyError):
            pytest.fail(f"{name}: {Issuer.read(document)}")


def test_key_sets_of_another_form_are_refused(issuer: Issuer) -> None:
    jwk = issuer.key.to_jwk()
    for document in ([], [jwk] * 2, [{**jwk, "kid": 1}], [{}], [jwk, {"kid": "A"}]):
        with pytest.raises(IssuerKeyError):
            KeySet.read(json.dumps({"keys": document}))
    for text in ("", "[]", "null", '{"keys":{}}', '{"keys":[1]}', "{", b"\xff", '{"keys":[],"keys":[]}', "[" * 10**5):
        with pytest.raises(IssuerKeyError, match="not a key set"):
            KeySet.read(text)
    many = [{**jwk, "kid": f"{i:043}"} for i in range(MAX_KEYS + 1)]
    with pytest.raises(IssuerKeyError, match=f"1 to {MAX_KEYS} keys"):
        KeySet(many)
    keys = KeySet([{**jwk, "kid": "A" * 43}, jwk])
    assert keys[issuer.key.kid] == issuer.key  # a bad key beside it is refused only where it is asked for
    with pytest.raises(IssuerKeyError, match="thumbprint"):
        keys["A" * 43]
    with pytest.raises(OtherKeyError):
        keys["B" * 43]


def test_the_command_makes_shows_renews_and_checks_keys(tmp_path: Path) -> None:
    first, second, published = tmp_path / "first.key", tmp_path / "second.key", tmp_path / "issuer.jwks"
    made = macer("key", "new", first)
    assert made.exit_code == 0, made.output
    kid = made.stdout.split()[-1]
    again = macer("key", "new", first)
    assert (again.exit_code, "left as it is" in again.stderr) == (17, True)
    renewed = macer("key", "new", second, "--after", first, "--bits", "4096")
    assert renewed.exit_code == 0, renewed.output
    published.write_text(macer("key", "public", second).stdout)
    assert [k.get(RETIRED, False) for k in keys_in(published)] == [False, True]
    assert keys_in(published)[1]["kid"] == kid
    for path in (second, published):
        checked = macer("key", "check", path)
        assert checked.exit_code == 0, checked.output
        assert [line.split("  ")[1] for line in checked.stdout.splitlines()] == [
            "present, 4096 bits, the permutation proof holds",
            "retired, 3072 bits, the permutation proof holds",
        ]
    assert macer("key", "public", published).stdout == published.read_text()
    assert macer("key", "public", second, "--pem").stdout.count("BEGIN PUBLIC KEY") == 2
    old = Issuer.load(first).sign(b"{}")
    assert KeySet.read(published.read_bytes()).open(old).key.retired


def test_the_command_refuses_bad_keys_with_a_sentence(issuer: Issuer, other: Issuer, tmp_path: Path) -> None:
    path = tmp_path / "issuer.jwks"
    # The roots of the smaller key are below the larger one's modulus, so that nothing is wrong with their size.
    smaller, larger = sorted((issuer.key, other.key), key=lambda key: key.n)
    path.write_text(json.dumps({"keys": [{**larger.to_jwk(), PROOF: smaller.to_jwk()[PROOF]}]}))
    for arguments in (("check", path), ("check", tmp_path / "missing"), ("public", tmp_path)):
        result = macer("key", *arguments)
        assert result.exit_code in (2, 17), result.output
        assert "Traceback" not in result.output
    assert "the proof is another key's, or the key is dishonest" in macer("key", "check", path).stderr


def test_issuing_needs_neither_networks_nor_servers() -> None:
    absent = ("torch", "numpy", "scipy", "ray", "pydantic", "click", "fastapi", "PIL")
    code = f"import sys\nfor name in {absent}: sys.modules[name] = None\nimport macer_serve.issuing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    graph = house.imports()
    ours = {module: found for module, found in graph.items() if house.room(module) == "issuing"}
    assert len(ours) > 8
    for module, found in ours.items():
        assert {house.room(name) for name in found} <= {"issuing", "errors", "macer_serve"}, module
    assert not [group for group in house.circles(graph) if set(group) & set(ours)]
