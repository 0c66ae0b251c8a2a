"""Base64url has one text per value, so that no record or key has a second one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from macer_serve.errors import ParameterError
from macer_serve.issuing import Issuer
from macer_serve.issuing.base64url import decode, decode_integer, encode, encode_integer


@given(st.binary(max_size=80))
def test_bytes_come_back(data: bytes) -> None:
    assert decode(encode(data), "it") == data


@given(st.text(alphabet="AQgwZz09-_=+/ \n", max_size=9))
def test_a_text_is_refused_or_is_the_one_text_of_its_bytes(text: str) -> None:
    try:
        data = decode(text, "it")
    except ParameterError:
        return
    assert encode(data) == text


@pytest.mark.parametrize(
    "text", ["A", "AB", "AAB", "AA==", "AA=", "A A", "AAAA\n", "AA+A", "AA/A", "AAA\u00c5", "AAAAA"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="it is not"):
        decode(text, "it")


@given(st.integers(1, 2**200))
def test_integers_come_back(value: int) -> None:
    assert decode_integer(encode_integer(value), "it") == value


@pytest.mark.parametrize("text", ["", "AA", "AAE", "AAEAAQ"])
def test_integers_have_no_leading_zeros(text: str) -> None:
    with pytest.raises(ParameterError):
        decode_integer(text, "it")


def test_a_proof_whose_bytes_leave_unused_bits_has_one_text() -> None:
    """512 bytes take 683 characters, of which the last has two unused bits; 384 bytes leave none."""
    issuer = Issuer.new(4096)
    about = {f"{name}_digest": "sha256:" + "0" * 64 for name in ("input", "model", "policy")}
    proof, jws = issuer.seed_proof(**about), issuer.sign(b"{}")
    assert issuer.key.seed(proof.text, **about) == proof.seed
    assert issuer.key.payload(jws) == b"{}"
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for bits in (1, 2, 3):
        last = alphabet[alphabet.index(proof.text[-1]) ^ bits]
        with pytest.raises(ParameterError, match="canonical"):
            issuer.key.seed(proof.text[:-1] + last, **about)
        with pytest.raises(ParameterError, match="canonical"):
            issuer.key.payload(jws[:-1] + alphabet[alphabet.index(jws[-1]) ^ bits])
