"""Thousands of mutated signed records and key sets: none verifies, each is refused quickly and in words."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from macer_serve.errors import MacerError
from macer_serve.issuing import CERTIFICATE, Issuer, IssuerKey, KeySet
from macer_serve.issuing.base64url import decode, encode
from macer_serve.issuing.keys import PROOF, RETIRED

PAYLOAD = json.dumps({"label": "cat", "radius": 0.516204, "votes": [1, 2, 3]}).encode()
FORGED = PAYLOAD.replace(b"0.5", b"9.5")
LIMIT_S = 1.0  # processor time per mutant
# A permutation proof with a wrong last root takes eight exponentiations, about 0.5 s on a core that does nothing else.
LIMIT_OF_PROOFS_S = 4.0
DEEP, HUGE = "[" * 5000 + "]" * 5000, "9" * 5000
REPLACEMENTS = [
    "null",
    "true",
    "0",
    "-1",
    HUGE,
    "1e999",
    "NaN",
    '""',
    '"A"',
    '"AA=="',
    '"\\ud800"',
    "[]",
    "{}",
    '[""]',
    DEEP,
]


class Outcomes:
    """Runs mutants, counts and times them; fails for a mutant that is accepted, or refused by any other error."""

    def __init__(self) -> None:
        self.refused, self.longest_s = 0, 0.0

    def refuse(self, mutant: object, read: Callable[[], object]) -> None:
        began = time.thread_time()
        try:
            result = read()
        except MacerError as error:
            message = str(error)
        else:
            pytest.fail(f"accepted: {str(mutant)[:300]!r} as {result!r}")
        self.refused += 1
        self.longest_s = max(self.longest_s, time.thread_time() - began)
        assert message.isascii(), "messages must print anywhere"
        assert len(message) < 400


def texts_of(document: dict[str, Any]) -> Iterator[str]:
    """Yields JSON texts of an object: members dropped, replaced, repeated, moved, added; the space around them."""
    text = json.dumps(document, separators=(",", ":"))
    yield json.dumps(document)
    yield " " + text
    yield text + "\n"
    yield "\ufeff" + text
    yield json.dumps(dict(reversed(document.items())), separators=(",", ":"))
    for name in document:
        rest = {key: value for key, value in document.items() if key != name}
        yield json.dumps(rest, separators=(",", ":"))
        yield text.replace(f'"{name}"', f'"{name.upper()}"')
        yield text.replace(f'"{name}"', f'"\\u{ord(name[0]):04x}{name[1:]}"')
        yield text[:-1] + f',"{name}":{json.dumps(document[name])}}}'
        for value in REPLACEMENTS:
            yield text.replace(f'"{name}":{json.dumps(document[name], separators=(",", ":"))}', f'"{name}":{value}')
            yield text[:-1] + f',"{name}":{value}}}'
            yield f'{{"{name}":{value},' + text[1:]


def headers(issuer: Issuer, other: Issuer) -> Iterator[str]:
    """Yields headers that another reader might follow."""
    kid = issuer.key.kid
    plain = {"alg": "RS256", "kid": kid, "typ": CERTIFICATE}
    yield from texts_of(plain)
    names = ["none", "None", "NONE", "nOnE", "HS256", "HS512", "RS384", "RS512", "PS256", "ES256", "EdDSA"]
    names += ["rs256", "RS256\\u0000", "RSA1_5", "dir"]
    yield from (f'{{"alg":"{alg}","kid":"{kid}","typ":"{CERTIFICATE}"}}' for alg in names)
    yield from (f'{{"alg":"{alg}"}}' for alg in names)
    extra: list[dict[str, Any]] = [
        {"crit": []},
        {"crit": ["b64"], "b64": False},
        {"crit": ["exp"], "exp": 0},
        {"b64": False},
        {"b64": True},
        {"jwk": other.key.to_jwk()},
        {"jku": "https://127.0.0.1/keys"},
        {"x5u": "https://127.0.0.1/keys"},
        {"x5c": ["AAAA"]},
        {"x5t": "AAAA"},
        {"cty": "JWT"},
        {"zip": "DEF"},
        {"enc": "A128GCM"},
        {"": ""},
        {"kid ": other.key.kid},
    ]
    for members in extra:
        for document in ({**plain, **members}, {**members, **plain}):
            yield json.dumps(document, separators=(",", ":"))
    for typ in (
        "JWT",
        "macer-claim+jws",
        "macer-certificate",
        "application/macer-certificate+jws",
        CERTIFICATE.upper(),
    ):
        yield json.dumps({**plain, "typ": typ}, separators=(",", ":"))
    for other_kid in (other.key.kid, kid[:-1], kid + "A", kid.swapcase(), "../../issuer", ""):
        yield json.dumps({**plain, "kid": other_kid}, separators=(",", ":"))


def test_no_other_header_is_accepted_even_if_the_issuers_key_signed_it(issuer: Issuer, other: Issuer) -> None:
    """Signed by RS256 with the true key, by HMAC with every text of the public key, or not at all."""
    outcomes, genuine = Outcomes(), issuer.sign(PAYLOAD)
    public = [issuer.key.to_pem(), issuer.keys.to_json(), json.dumps(issuer.key.to_jwk()), issuer.key.to_jwk()["n"], ""]
    signature = genuine.split(".")[2]
    for header in headers(issuer, other):
        begun = f"{encode(header.encode())}.{encode(PAYLOAD)}"
        if begun == genuine.rpartition(".")[0]:
            continue
        for text in (
            encode(issuer._signature(begun.encode())),
            signature,
            "",
            encode(hmac.digest(public[outcomes.refused % 5].encode(), begun.encode(), hashlib.sha256)),
        ):
            outcomes.refuse(header, lambda text=text, begun=begun: issuer.keys.open(f"{begun}.{text}"))
    assert outcomes.refused > 800
    assert outcomes.longest_s < LIMIT_S


def cut_and_joined(first: str, second: str, rng: random.Random) -> Iterator[str]:
    """Yields records made of the pieces of two, and other serializations of them."""
    a, b = first.split("."), second.split(".")
    for i in range(1, 7):
        yield ".".join((a[k] if i >> k & 1 else b[k]) for k in range(3))
    for parts in (
        a[:2],
        a[:1],
        a + b,
        [*a, ""],
        ["", *a],
        [a[0], a[1], a[2], a[2]],
        [a[2], a[1], a[0]],
        [a[0], a[2], a[1]],
    ):
        yield ".".join(parts)
    for i in range(3):
        for empty in ("", "A", "=", "AA=="):
            yield ".".join(empty if k == i else part for k, part in enumerate(a))
    yield json.dumps({"protected": a[0], "payload": a[1], "signature": a[2]})
    yield json.dumps({"payload": a[1], "signatures": [{"protected": a[0], "signature": a[2]}]})
    yield from (first + tail for tail in ("=", "==", "\n", " ", "\0", ".", "A", second, "\u00e9", "\ud800"))
    yield from (head + first for head in ("\n", " ", ".", "\ufeff", "A", "Bearer "))
    yield first.replace(".", ",")
    yield first.replace(".", "\u3002")
    for _ in range(400):
        cut = rng.randrange(len(first))
        yield rng.choice([first[:cut], first[cut:], first[:cut] + second[cut:], first[:cut] + first[cut + 1 :]])


def flipped(text: str, rng: random.Random) -> str:
    """Returns the text with one character changed, added, moved or repeated."""
    i, j = rng.randrange(len(text)), rng.randrange(len(text))
    character = rng.choice('ABCdef019-_.=+/ \n\0\x7f\u00e9\u20ac\U0001f600\ud800"\\{}[],:')
    return rng.choice(
        [
            text[:i] + character + text[i + 1 :],
            text[:i] + character + text[i:],
            text[: min(i, j)] + text[max(i, j) :],
            text[:i] + text[j : j + 8] + text[i:],
            text[:i] + text[i : i + 1].swapcase() + text[i + 1 :],
            text[:i] + chr(ord(text[i]) ^ 1 << rng.randrange(7)) + text[i + 1 :],
        ]
    )


def signature_mutants(issuer: Issuer, jws: str) -> Iterator[str]:
    """Yields the record with signatures of other paddings, algorithms and forms."""
    begun, _, text = jws.rpartition(".")
    n, s = issuer.key.n, int.from_bytes(decode(text, ""), "big")
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    data = begun.encode()
    others = [
        issuer._private.sign(data, pss, hashes.SHA256()),
        issuer._private.sign(data, padding.PKCS1v15(), hashes.SHA384()),
        issuer._private.sign(data, padding.PKCS1v15(), hashes.SHA512()),
        issuer._private.sign(data + b"\n", padding.PKCS1v15(), hashes.SHA256()),
    ]
    others += [(s + k * n).to_bytes(385, "big") for k in range(5)] + [
        (n - s).to_bytes(384, "big"),
        s.to_bytes(386, "big"),
    ]
    yield from (f"{begun}.{encode(other)}" for other in others)
    yield f"{begun}.{base64.b64encode(s.to_bytes(384, 'big')).decode()}="


def test_no_mutant_of_a_signed_record_is_accepted(issuer: Issuer, other: Issuer) -> None:
    rng, outcomes = random.Random(14), Outcomes()
    genuine = issuer.sign(PAYLOAD)
    mutants = [
        *cut_and_joined(genuine, issuer.sign(FORGED), rng),
        *cut_and_joined(genuine, other.sign(PAYLOAD), rng),
        *signature_mutants(issuer, genuine),
        *(flipped(genuine, rng) for _ in range(1500)),
    ]
    valid = {genuine, issuer.sign(FORGED)}
    for jws in mutants:
        if jws not in valid:
            outcomes.refuse(jws, lambda jws=jws: issuer.keys.open(jws))
    for thing in (None, 1, b"", [], genuine.encode()):
        outcomes.refuse(thing, lambda thing=thing: issuer.keys.open(thing))
    assert outcomes.refused > 2200
    assert outcomes.longest_s < LIMIT_S
    assert issuer.keys.open(genuine).payload == PAYLOAD


def key_set_mutants(issuer: Issuer, rng: random.Random) -> Iterator[str | bytes]:
    """Yields key sets as text, and bytes that are none. Few mutants reach the slow check of roots."""
    jwk = issuer.key.to_jwk()
    marks = {f"root{i}": root for i, root in enumerate(jwk[PROOF])}
    template = {**jwk, PROOF: list(marks)}

    def filled(text: str) -> str:
        for mark, root in marks.items():
            text = text.replace(mark, root)
        return text

    for text in texts_of(template):
        yield filled(f'{{"keys":[{text}]}}')
    for _ in range(1200):
        yield filled(flipped(f'{{"keys":[{json.dumps(template)}]}}', rng))
    for value in REPLACEMENTS:
        yield f'{{"keys":{value}}}'
        yield f'{{"keys":[{value}]}}'
        yield value
        yield filled(f'{{"keys":[{json.dumps({**template, PROOF: [*list(marks)[:7], "@"]})}]}}').replace('"@"', value)
        yield filled(f'{{"keys":[{json.dumps(template)}],"keys":{value}}}')
    for i in range(8):  # one character of one root
        roots = list(jwk[PROOF])
        at = rng.randrange(500)
        roots[i] = roots[i][:at] + ("A" if roots[i][at] != "A" else "B") + roots[i][at + 1 :]
        yield json.dumps({"keys": [{**jwk, PROOF: roots}]})
    for d in ("d", "p", "q", "dp", "dq", "qi", "oth", "k"):
        yield json.dumps({"keys": [{**jwk, d: "AQ"}]})
    yield json.dumps({"keys": [jwk, jwk]})
    yield json.dumps({"keys": [jwk] * 17})
    yield json.dumps({"keys": [jwk], "x": " " * 2**18})
    yield from (rng.randbytes(rng.randrange(200)) for _ in range(200))


def test_no_mutant_of_a_key_set_makes_another_key(issuer: Issuer) -> None:
    """A mutant is refused, or it is the same key: unknown members and spaces are allowed in a JWK Set."""
    rng, outcomes, same = random.Random(41), Outcomes(), 0
    genuine = issuer.sign(PAYLOAD)

    def read(text: str | bytes) -> IssuerKey:
        key = KeySet.read(text).open(genuine).key
        if (key.n, key.proof) == (issuer.key.n, issuer.key.proof):
            raise LookupError("the same key")
        return key

    for text in key_set_mutants(issuer, rng):
        try:
            outcomes.refuse(text, lambda text=text: read(text))
        except LookupError:
            same += 1
    assert outcomes.refused > 1100
    assert outcomes.longest_s < LIMIT_OF_PROOFS_S
    assert 0 < same < 400


def test_an_attackers_key_never_passes_for_the_issuers(issuer: Issuer, other: Issuer) -> None:
    """Every mixture of the members of two keys. What the attacker signed under the issuer's kid never verifies."""
    outcomes, mine, theirs = Outcomes(), issuer.key.to_jwk(), other.key.to_jwk()
    header, payload, _ = issuer.sign(FORGED).split(".")
    forged = f"{header}.{payload}.{encode(other._signature(f'{header}.{payload}'.encode()))}"
    for members in range(8):
        mixed = {**mine, **{name: theirs[name] for i, name in enumerate(("kid", "n", PROOF)) if members >> i & 1}}
        for keys in ([mixed], [mixed, theirs], [theirs, mixed], [mixed, {**mixed, RETIRED: True}]):
            outcomes.refuse(mixed, lambda keys=keys: KeySet.read(json.dumps({"keys": keys})).open(forged))
    assert outcomes.refused == 32
