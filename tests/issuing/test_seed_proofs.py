"""One input has one seed: no second proof of a message verifies, and Ed25519 would have allowed many."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from macer_serve.errors import MacerError, ParameterError, SignatureError
from macer_serve.issuing import Issuer
from macer_serve.issuing.base64url import encode
from macer_serve.issuing.rsa import PUBLIC_EXPONENT, accepts, encoded, thumbprint, width
from macer_serve.issuing.seeds import seed_message, seed_of


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


ABOUT = {"input_digest": digest("image"), "model_digest": digest("model"), "policy_digest": digest("policy")}


def message(issuer: Issuer, about: dict[str, str] = ABOUT) -> bytes:
    return seed_message(thumbprint(issuer.key.n), **about)


def numbers(issuer: Issuer) -> Any:
    return issuer._private.private_numbers()


def signed(issuer: Issuer, encoding: bytes) -> bytes:
    """Returns the e-th root of any encoding: what only the private key's holder can make."""
    n = issuer.key.n
    return pow(int.from_bytes(encoding, "big"), numbers(issuer).d, n).to_bytes(width(n), "big")


def test_the_message_and_the_seed_are_those_of_the_specification(issuer: Issuer) -> None:
    proof = issuer.seed_proof(**ABOUT)
    thumb = hashlib.sha256(
        b'{"e":"AQAB","kty":"RSA","n":"' + encode(issuer.key.n.to_bytes(384, "big")).encode() + b'"}'
    ).digest()
    expected = b"\x00macer-serve/seed/1\x00" + thumb
    expected += b"".join(hashlib.sha256(part).digest() for part in (b"image", b"model", b"policy"))
    s = int.from_bytes(signed(issuer, encoded(expected, 384)), "big")
    assert pow(s, 65537, issuer.key.n).to_bytes(384, "big").startswith(b"\x00\x01\xff")
    assert proof.text == encode(s.to_bytes(384, "big"))
    assert proof.seed == hashlib.sha256(b"macer-serve/seed-of/1\x00" + s.to_bytes(384, "big")).digest()[:16]
    assert issuer.key.kid == encode(thumb)
    assert issuer.key.seed(proof.text, **ABOUT) == proof.seed == issuer.seed_proof(**ABOUT).seed


@pytest.mark.parametrize("name", ABOUT)
def test_another_input_model_policy_or_key_has_another_seed(issuer: Issuer, other: Issuer, name: str) -> None:
    proof, changed = issuer.seed_proof(**ABOUT), ABOUT | {name: digest("another")}
    seeds = {proof.seed, issuer.seed_proof(**changed).seed, other.seed_proof(**ABOUT).seed}
    assert len(seeds) == 3
    with pytest.raises(SignatureError, match="not this key's"):
        issuer.key.seed(proof.text, **changed)
    with pytest.raises(SignatureError, match="not this key's"):
        other.key.seed(proof.text, **ABOUT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "sha256:" + "A" * 64,
        "sha512:" + "a" * 64,
        "sha256:" + "a" * 63 + "\n",
        "sha256:" + "a" * 64 + "\n",
        "sha256:" + "a" * 66,
    ],
)
@pytest.mark.parametrize("name", ABOUT)
def test_malformed_digests_are_refused(issuer: Issuer, name: str, text: str) -> None:
    with pytest.raises(ParameterError, match="digest must be sha256"):
        issuer.seed_proof(**ABOUT | {name: text})
    with pytest.raises(ParameterError, match="digest must be sha256"):
        issuer.key.seed("AAAA", **ABOUT | {name: text})


def malleations(issuer: Issuer, about: dict[str, str]) -> dict[str, bytes]:
    """Returns what a lax verifier might take for a second signature of the message."""
    n, length, text = issuer.key.n, width(issuer.key.n), message(issuer, about)
    s = int.from_bytes(signed(issuer, encoded(text, length)), "big")
    whole, hashed = encoded(text, length), hashlib.sha256(text).digest()
    without_null = bytes.fromhex("302f300b0609608648016503040201") + b"\x04\x20" + hashed
    long_form = bytes.fromhex("308131300d060960864801650304020105000420") + hashed
    private = issuer._private
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)

    def filled(info: bytes) -> bytes:
        return b"\0\1" + b"\xff" * (length - 3 - len(info)) + b"\0" + info

    return {
        "s + n, one byte longer": (s + n).to_bytes(length + 1, "big"),
        "s + n, leading byte cut": (s + n).to_bytes(length + 1, "big")[1:],
        "leading zero": b"\0" + s.to_bytes(length, "big"),
        "many leading zeros": s.to_bytes(2 * length, "big"),
        "trailing zero": s.to_bytes(length, "big") + b"\0",
        "first byte cut": s.to_bytes(length, "big")[1:],
        "last byte cut": s.to_bytes(length, "big")[:-1],
        "n - s": (n - s).to_bytes(length, "big"),
        "inverse of s": pow(s, -1, n).to_bytes(length, "big"),
        "little-endian": s.to_bytes(length, "little"),
        "empty": b"",
        "zero": bytes(length),
        "one": (1).to_bytes(length, "big"),
        "n - 1": (n - 1).to_bytes(length, "big"),
        "n": n.to_bytes(length, "big"),
        "the encoding itself": whole,
        "PSS": private.sign(text, pss, hashes.SHA256()),
        "SHA-512": private.sign(text, padding.PKCS1v15(), hashes.SHA512()),
        "SHA-1": signed(issuer, filled(bytes.fromhex("3021300906052b0e03021a05000414") + hashlib.sha1(text).digest())),
        "no DigestInfo": signed(issuer, filled(hashed)),
        "missing NULL": signed(issuer, filled(without_null)),
        "lengths in long form": signed(issuer, filled(long_form)),
        "short padding, garbage after the hash": signed(
            issuer, (b"\0\1" + b"\xff" * 8 + whole[-52:]).ljust(length, b"\x2a")
        ),
        "block type 2": signed(issuer, b"\0\2" + whole[2:]),
        "one padding byte changed": signed(issuer, whole[:9] + b"\xfe" + whole[10:]),
        "first byte 1": signed(issuer, b"\1" + whole[1:]) if int.from_bytes(b"\1" + whole[1:], "big") < n else b"\1",
    }


def test_no_second_proof_of_a_message_verifies(issuer: Issuer) -> None:
    """s + n, shorter than n in bytes, exists for small s only; some input has one."""
    n, length, found = issuer.key.n, width(issuer.key.n), 0
    for i in range(60):
        about = ABOUT | {"input_digest": digest(f"image {i}")}
        proof, text = issuer.seed_proof(**about), message(issuer, about)
        s = int.from_bytes(signed(issuer, encoded(text, length)), "big")
        assert accepts(n, text, s.to_bytes(length, "big"))
        if (s + n).bit_length() > 8 * length:
            continue
        found += 1
        second = (s + n).to_bytes(length, "big")
        assert pow(int.from_bytes(second, "big"), PUBLIC_EXPONENT, n) == pow(s, PUBLIC_EXPONENT, n)
        assert not accepts(n, text, second)
        with pytest.raises(SignatureError):
            issuer.key.seed(encode(second), **about)
        assert issuer.key.seed(proof.text, **about) == proof.seed
        if found == 3:
            break
    assert found
    for name, signature in malleations(issuer, ABOUT).items():
        assert not accepts(n, message(issuer), signature), name
        with pytest.raises(SignatureError):
            issuer.key.seed(encode(signature), **ABOUT)


def test_no_second_text_of_a_proof_verifies(issuer: Issuer) -> None:
    """A seed is the hash of the bytes, but records that differ in the text alone would be two certificates."""
    text = issuer.seed_proof(**ABOUT).text
    assert len(text) == 512
    texts = [
        text + "=",
        text + "==",
        text + "\n",
        " " + text,
        text[:8] + "\n" + text[8:],
        text.replace("-", "+"),
        text + "A",
    ]
    texts += [text[:-1], "", text.swapcase(), text + "\0", text[:100] + "é" + text[101:]]
    for other in texts:
        if other != text:
            with pytest.raises(MacerError):
                issuer.key.seed(other, **ABOUT)


# Ed25519 (RFC 8032, section 5.1), with a nonce of the signer's own choice.
P, ORDER = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    product = D * a[0] * b[0] * a[1] * b[1] % P
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + product, -1, P)
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P)
    return x % P, y % P


def times(k: int, point: Point) -> Point:
    total: Point = (0, 1)
    while k:
        if k & 1:
            total = add(total, point)
        point, k = add(point, point), k >> 1
    return total


def packed(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


BASE: Point = (15112221349535400772501151409588531511454012693041857206046113283949847762202, 4 * pow(5, -1, P) % P)


def test_with_ed25519_an_issuer_could_choose_among_seeds() -> None:
    """Every nonce gives another signature of the same message, and every one of them verifies."""
    secret = int.from_bytes(hashlib.sha256(b"a private key").digest(), "little") % ORDER
    public = packed(times(secret, BASE))
    verifier, text, seeds = Ed25519PublicKey.from_public_bytes(public), b"seed message", set()
    for nonce in range(2, 34):
        r = packed(times(nonce, BASE))
        challenge = int.from_bytes(hashlib.sha512(r + public + text).digest(), "little")
        signature = r + ((nonce + challenge * secret) % ORDER).to_bytes(32, "little")
        verifier.verify(signature, text)  # raises if it does not hold
        seeds.add(seed_of(signature))
    assert len(seeds) == 32
