"""Whoever lacks the private key cannot make a record that is proved or consistent: thousands of mutants are refused.

An attacker holds honest answers, all public keys and a key of his own. He changes fields, alone and in groups that
follow from each other, payloads, headers and signatures, and joins parts of different answers.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from brightness import SEEDS, config, image, issuer
from checking import Made, at, changed

from macer_serve.errors import ParameterError
from macer_serve.issuing import Issuer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.verification import Verdict, read_document, verify

MUTANTS = int(os.environ.get("MACER_MUTANTS", "800"))  # 12,000 were made once: results/mutants.txt
SECONDS = 5.0  # of processor time, for any mutant
ATTACKER = Issuer.new()
STRANGE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**52, 2**70, 1e300, -1e-300, 5e-324, 0.5, "", "x", "\ud800", [], [[]], {}, {"a": 1},
    [1, 2], [-1], [[1]], [[[1, 2]]], "n", "soft", "predict", "sha256:" + 64 * "0",
]  # fmt: skip


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def near(value: Any, dice: np.random.Generator) -> Any:
    """Returns another value of the same kind, or a strange one."""
    if isinstance(value, bool) or dice.random() < 0.3:
        return not value if isinstance(value, bool) else STRANGE[dice.integers(len(STRANGE))]
    if isinstance(value, int):
        return value + int(dice.choice([-1, 1, 10, -10, 1000]))
    if isinstance(value, float):
        return value * float(dice.choice([0.5, 0.99, 1.01, 2.0])) + float(dice.choice([0.0, 1e-6]))
    if isinstance(value, str) and value:
        k = int(dice.integers(len(value)))
        return value[:k] + chr(33 + (ord(value[k]) - 32) % 90) + value[k + 1 :]
    return STRANGE[dice.integers(len(STRANGE))]


def path_into(record: Any, dice: np.random.Generator) -> tuple[Any, ...]:
    path: tuple[Any, ...] = ()
    inner = record
    while isinstance(inner, dict | list) and inner and (not path or dice.random() < 0.7):
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        path = (*path, keys[int(dice.integers(len(keys)))])
        inner = at(record, path)
    return path


def mutated(record: dict[str, Any], dice: np.random.Generator) -> dict[str, Any]:
    """Returns the record with one to three fields changed."""
    for _ in range(int(dice.integers(1, 4))):
        path = path_into(record, dice)
        record = changed(record, path, near(at(record, path), dice))
    return record


def invented(c: Certificate, pixels: Any, by: Any) -> dict[str, Any]:
    """Returns a record of unanimous votes in which every field follows from the others, for another issuer's seed."""
    plan = Plan.from_json(c.plan)
    g = SmoothedClassifier(config(), issuer=by)
    model_input = g.model_input(pixels)
    run = g.certification(model_input, plan)
    while not run.done:
        draw: Any = run.wants()
        shape = (3,) if draw.beta is None else (3, 1024)
        votes = np.zeros(shape, np.int64)
        if draw.beta is None:
            votes[2] = len(draw)
        else:
            votes[:2, 0], votes[2, 1023] = len(draw), len(draw)
        run.add(draw, votes)
    return g.certificate(model_input, run, g.seed_proof(model_input, plan), c.engine).to_json()


def attempts(honest: Made, dice: np.random.Generator) -> Iterator[tuple[str, bytes, Any]]:
    """Yields what was tried, the document, and the image that it is said to be about."""
    names = ["fixed", "tolerance", "two-sided", "soft", "predict", "resized", "abstained", "radius"]
    signed = {name: issuer().sign(honest[name][1].canonical()) for name in names}
    while True:
        name, other = (names[int(dice.integers(len(names)))] for _ in range(2))
        pixels, c = honest[name]
        record, jws = c.to_json(), signed[name]
        header, payload, signature = jws.split(".")

        def document(certificate: Any, jws: Any) -> bytes:
            return json.dumps({"certificate": certificate, "certificate_jws": jws}).encode()

        changes = mutated(record, dice)
        if changes == record:
            continue
        new_payload = base64url(json.dumps(changes).encode())
        yield "copy changed", document(changes, jws), pixels
        yield "copy and payload changed", document(changes, f"{header}.{new_payload}.{signature}"), pixels
        yield "payload changed", f"{header}.{new_payload}.{signature}".encode(), pixels
        yield "unsigned", json.dumps(changes).encode(), pixels
        yield "own key, changed", ATTACKER.sign(json.dumps(changes).encode()).encode(), pixels
        own = invented(c, pixels, ATTACKER)
        yield "own key and seed", ATTACKER.sign(json.dumps(own).encode()).encode(), pixels
        renamed = {**own, "key_id": c.key_id}
        own_header = ATTACKER.sign(json.dumps(renamed).encode()).split(".")
        yield "own signature under the issuer's name", f"{header}.{own_header[1]}.{own_header[2]}".encode(), pixels
        yield "invented without a seed proof", json.dumps(invented(c, pixels, SEEDS)).encode(), pixels
        stolen = {**invented(c, pixels, SEEDS), "seed_proof": c.seed_proof, "key_id": c.key_id}
        yield "invented with a seed proof of the issuer", json.dumps(stolen).encode(), pixels
        yield "another image", document(record, jws), image(int(dice.integers(0, 256)) | 1)
        if other != name:
            rest = signed[other].split(".")
            yield "joined", ".".join([header, payload, rest[2]]).encode(), pixels
            yield "joined", ".".join([header, rest[1], signature]).encode(), pixels
            yield "answer of another", document(honest[other][1].to_json(), jws), pixels
        cut = int(dice.integers(len(jws)))
        yield "cut", jws[:cut].encode(), pixels
        yield "a character", (jws[:cut] + ("B" if jws[cut] == "A" else "A") + jws[cut + 1 :]).encode(), pixels
        for alg in ("none", "HS256", "RS512", "PS256", ""):
            head = base64url(json.dumps({"alg": alg, "kid": c.key_id, "typ": "macer-certificate+jws"}).encode())
            yield f"alg {alg}", f"{head}.{payload}.{signature if dice.random() < 0.5 else ''}".encode(), pixels
        twice = json.dumps(record)[:-1] + ', "radius": 9.0}'
        yield "a name twice", json.dumps({"certificate": 0}).replace("0", twice).encode(), pixels
        yield "huge", json.dumps(record).replace(str(c.n), "1" + 400 * "0", 1).encode(), pixels


def test_no_mutant_is_accepted(honest: Made) -> None:
    dice, seen = np.random.default_rng(5), Counter[tuple[str, str]]()
    slowest = 0.0
    for count, (what, data, pixels) in enumerate(attempts(honest, dice)):
        if count >= MUTANTS:
            break
        began = time.process_time()
        try:
            verdict = verify(read_document(data), pixels, config(), keys=issuer().keys).verdict
        except ParameterError:
            verdict = Verdict.NOT_READABLE
        slowest = max(slowest, time.process_time() - began)
        assert verdict.refutes or verdict is Verdict.NOT_AUTHENTICATED, (what, verdict, data[:3000])
        seen[what, verdict.value] += 1
    for (what, verdict_name), times in sorted(seen.items()):
        print(f"{times:6} {what}: {verdict_name}")
    print(f"slowest: {slowest:.2f} s of processor time")
    assert slowest < SECONDS
    assert len({what for what, _ in seen}) >= 16


@pytest.mark.parametrize("classes", [2, 40, 400])
def test_records_of_full_histograms_take_bounded_time(classes: int, honest: Made) -> None:
    """All levels of many classes under a plan of ten million votes: evaluating the bounds could take minutes."""
    pixels, c = honest["soft"]
    dice = np.random.default_rng(1)
    votes = [sorted(dice.multinomial(9_000_000, np.full(1024, 1 / 1024)).tolist()) for _ in range(classes)]
    full = [[[level, k] for level, k in enumerate(row)] for row in votes]
    selection = [[[0, 50]] for _ in range(classes)]
    plan = Plan(n0=50, n=10**7, bound="soft", beta=c.plan["beta"], tolerance=0.1).to_json()
    changes = {"votes": full, "selection_votes": selection, "n": 9_000_000, "proof_n": 9_000_000, "stopped": "cap"}
    record = {**c.to_json(), **changes, "plan": plan, "bound": "mixture"}
    began = time.process_time()
    report = verify(read_document(json.dumps(record).encode()), pixels, config(), keys=issuer().keys)
    assert time.process_time() - began < SECONDS
    assert report.verdict.refutes
    evaluated = {f.check: f.outcome for f in report.findings}.get("p_lower, p_upper, radius") != "not checked"
    assert evaluated == (classes == 2)
