"""Signed records: only what the issuer signed is read, in the one form in which it was signed."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from macer_serve.cli.exit_codes import exit_code
from macer_serve.errors import OtherKeyError, ParameterError, SignatureError
from macer_serve.issuing import CERTIFICATE, CLAIM, Issuer, KeySet
from macer_serve.issuing.base64url import decode, encode
from macer_serve.issuing.jws import MAX_CHARACTERS, TYPES

PAYLOAD = json.dumps({"radius": 0.516204, "label": "cat"}).encode()


def header_of(jws: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(decode(jws.split(".")[0], "header"))
    return document


@pytest.mark.parametrize("typ", TYPES)
@pytest.mark.parametrize("payload", [PAYLOAD, b"\0", bytes(range(256)), b"x" * 100_000])
def test_what_was_signed_is_read_again(issuer: Issuer, typ: str, payload: bytes) -> None:
    jws = issuer.sign(payload, typ)
    assert header_of(jws) == {"alg": "RS256", "kid": issuer.key.kid, "typ": typ}
    assert issuer.sign(payload, typ) == jws
    assert "\0" not in jws
    assert issuer.key.payload(jws, typ) == payload
    signed = KeySet.read(issuer.keys.to_json()).open(jws, typ)
    assert (signed.payload, signed.key) == (payload, issuer.key)


def test_threads_sign_alike(issuer: Issuer) -> None:
    """The server signs in threads, beside the votes of other requests."""
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(issuer.sign, [PAYLOAD] * 32)) == {issuer.sign(PAYLOAD)}


def test_the_private_key_does_not_travel(issuer: Issuer) -> None:
    """An issuer that was sent to a worker would leave its key in that machine's memory and logs."""
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(issuer)


def test_a_claim_is_no_certificate(issuer: Issuer) -> None:
    for typ, other in ((CERTIFICATE, CLAIM), (CLAIM, CERTIFICATE)):
        with pytest.raises(ParameterError, match=f"of the type {other.split('+')[0]}"):
            issuer.keys.open(issuer.sign(PAYLOAD, other), typ)


def test_another_key_is_named_and_never_called_a_forgery(issuer: Issuer, other: Issuer) -> None:
    jws = other.sign(PAYLOAD)
    for read in (issuer.key.payload, issuer.keys.open):
        with pytest.raises(OtherKeyError, match="issued under another key") as caught:
            read(jws)
        assert other.key.kid in str(caught.value)
    assert exit_code(caught.value) == 13


def test_a_record_of_another_key_under_this_kid_does_not_hold(issuer: Issuer, other: Issuer) -> None:
    header, payload, signature = other.sign(PAYLOAD).split(".")
    renamed = encode(decode(header, "").replace(other.key.kid.encode(), issuer.key.kid.encode()))
    with pytest.raises(SignatureError, match="does not hold"):
        issuer.keys.open(f"{renamed}.{payload}.{signature}")


def test_a_changed_payload_does_not_hold(issuer: Issuer) -> None:
    header, _, signature = issuer.sign(PAYLOAD).split(".")
    for payload in (PAYLOAD.replace(b"0.5", b"0.9"), PAYLOAD + b" ", b"{}"):
        with pytest.raises(SignatureError, match="does not hold"):
            issuer.keys.open(f"{header}.{encode(payload)}.{signature}")


def test_a_seed_proof_signs_no_record(issuer: Issuer) -> None:
    """The message of a seed proof begins with byte 00, which no signing input of a JWS contains."""
    digests = {f"{name}_digest": "sha256:" + "a" * 64 for name in ("input", "model", "policy")}
    header, payload, signature = issuer.sign(PAYLOAD).split(".")
    with pytest.raises(SignatureError):
        issuer.keys.open(f"{header}.{payload}.{issuer.seed_proof(**digests).text}")
    with pytest.raises(SignatureError):
        issuer.key.seed(signature, **digests)


@pytest.mark.parametrize("typ", ["", "JWT", "macer-certificate", 'x","alg":"none'])
def test_unknown_types_are_not_signed(issuer: Issuer, typ: str) -> None:
    with pytest.raises(ParameterError, match="type must be one of"):
        issuer.sign(PAYLOAD, typ)


def test_sizes_have_limits(issuer: Issuer) -> None:
    for payload in (b"", bytes(MAX_CHARACTERS * 3 // 4)):
        with pytest.raises(ParameterError, match="must have 1 to"):
            issuer.sign(payload)
    largest = bytes((MAX_CHARACTERS - 1024) * 3 // 4 - 200)
    jws = issuer.sign(largest)
    assert issuer.keys.open(jws).payload == largest
    with pytest.raises(ParameterError, match="at most"):
        issuer.keys.open(jws + "A" * MAX_CHARACTERS)
