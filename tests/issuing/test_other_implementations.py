"""Seeds, signatures and keys hold for implementations that share no code with this one: openssl and joserfc."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from joserfc import jwk, jws
from joserfc.errors import BadSignatureError

from macer_serve.issuing import Issuer
from macer_serve.issuing.base64url import decode, encode
from macer_serve.issuing.permutation import challenges
from macer_serve.issuing.rsa import encoded, thumbprint
from macer_serve.issuing.seeds import seed_message

PAYLOAD = json.dumps({"radius": 0.516204, "label": "cat"}).encode()
ABOUT = {
    f"{name}_digest": "sha256:" + hashlib.sha256(name.encode()).hexdigest() for name in ("input", "model", "policy")
}

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl's command line is not installed")


def openssl(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False)


@pytest.fixture
def public_pem(issuer: Issuer, tmp_path: Path) -> Path:
    path = tmp_path / "public.pem"
    path.write_text(issuer.key.to_pem())
    return path


def written(folder: Path, message: bytes, signature: bytes) -> tuple[Path, Path]:
    paths = folder / "message", folder / "signature"
    for path, data in zip(paths, (message, signature), strict=True):
        path.write_bytes(data)
    return paths


def messages(issuer: Issuer) -> dict[str, tuple[bytes, bytes]]:
    """Returns a seed proof and a signed certificate as message and signature."""
    header, payload, signature = issuer.sign(PAYLOAD).split(".")
    return {
        "seed proof": (seed_message(thumbprint(issuer.key.n), **ABOUT), decode(issuer.seed_proof(**ABOUT).text, "")),
        "certificate": (f"{header}.{payload}".encode(), decode(signature, "")),
    }


@needs_openssl
@pytest.mark.parametrize("use", ["seed proof", "certificate"])
def test_openssl_verifies_signatures(issuer: Issuer, public_pem: Path, tmp_path: Path, use: str) -> None:
    message, signature = messages(issuer)[use]
    paths = written(tmp_path, message, signature)
    result = openssl("dgst", "-sha256", "-verify", public_pem, "-signature", paths[1], paths[0])
    assert (result.returncode, result.stdout) == (0, b"Verified OK\n"), result.stderr
    paths[0].write_bytes(message + b"x")
    assert openssl("dgst", "-sha256", "-verify", public_pem, "-signature", paths[1], paths[0]).returncode == 1


@needs_openssl
def test_openssl_recovers_the_encoding_that_the_acceptance_rule_names(
    issuer: Issuer, public_pem: Path, tmp_path: Path
) -> None:
    message, signature = messages(issuer)["seed proof"]
    _, path = written(tmp_path, message, signature)
    raw = ("-pkeyopt", "rsa_padding_mode:none")
    result = openssl("pkeyutl", "-verifyrecover", "-pubin", "-inkey", public_pem, "-in", path, *raw)
    assert result.stdout == encoded(message, 384), result.stderr


@needs_openssl
@pytest.mark.parametrize("use", ["seed proof", "certificate"])
def test_openssl_makes_the_same_signature(issuer: Issuer, tmp_path: Path, use: str) -> None:
    """Signatures are unique, so any implementation makes this one."""
    message, signature = messages(issuer)[use]
    private = tmp_path / "private.pem"
    private.write_bytes(issuer._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path, _ = written(tmp_path, message, signature)
    result = openssl("dgst", "-sha256", "-sign", private, path)
    assert result.stdout == signature, result.stderr
    assert openssl("pkey", "-in", private, "-check", "-noout").returncode == 0


@needs_openssl
def test_openssl_finds_the_challenges_from_the_roots_of_the_permutation_proof(
    issuer: Issuer, public_pem: Path, tmp_path: Path
) -> None:
    """s^(e n) = r is (s^n)^e = r: the inner power is Python's, the outer one openssl's."""
    n = issuer.key.n
    for root, challenge in list(zip(issuer.key.proof, challenges(n), strict=True))[:2]:
        path = tmp_path / "root"
        path.write_bytes(pow(root, n, n).to_bytes(384, "big"))
        raw = ("-pkeyopt", "rsa_padding_mode:none")
        result = openssl("pkeyutl", "-verifyrecover", "-pubin", "-inkey", public_pem, "-in", path, *raw)
        assert int.from_bytes(result.stdout, "big") == challenge, result.stderr


def test_joserfc_reads_the_key_set_and_verifies_certificates(issuer: Issuer) -> None:
    keys = jwk.KeySet.import_key_set(json.loads(issuer.keys.to_json()))
    text = issuer.sign(PAYLOAD)
    found = jws.deserialize_compact(text, keys, algorithms=["RS256"])
    assert found.payload == PAYLOAD
    assert keys.keys[0].thumbprint() == issuer.key.kid
    header, _, signature = text.split(".")
    with pytest.raises(BadSignatureError):
        jws.deserialize_compact(f"{header}.{encode(PAYLOAD + b' ')}.{signature}", keys, algorithms=["RS256"])


def test_joserfc_makes_the_same_certificate(issuer: Issuer, tmp_path: Path) -> None:
    """The key file is a JWK Set that it reads too."""
    issuer.save(tmp_path / "issuer.key")
    private = jwk.RSAKey.import_key(json.loads((tmp_path / "issuer.key").read_bytes())["keys"][0])
    header = {"alg": "RS256", "kid": issuer.key.kid, "typ": "macer-certificate+jws"}
    assert jws.serialize_compact(header, PAYLOAD, private, algorithms=["RS256"]) == issuer.sign(PAYLOAD)
