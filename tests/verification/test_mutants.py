"""Whoever lacks the private key cannot make a record that is proved or consistent: thousands of mutants are refused.

An attacker holds honest answers, all public keys and a key of his own. He changes fields, alone and in groups that
follow from each other, payloads, headers and signatures, and joins parts of different answers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from brightness import SEEDS, config, image, issuer
from checking import Made
from mutations import SECONDS, Trial, base64url, mutated

from macer_serve.issuing import Issuer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.verification import Verdict, read_document, verify

MUTANTS = int(os.environ.get("MACER_MUTANTS", "800"))  # 12,000 were made once: results/mutants.txt
PARTS = 4
ATTACKER = Issuer.new()


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


@pytest.mark.parametrize("part", range(PARTS))
def test_no_mutant_is_accepted(honest: Made, part: int) -> None:
    trial, made = Trial(), attempts(honest, np.random.default_rng(5 + part))
    for what, data, pixels in islice(made, MUTANTS // PARTS):

        def check(data: bytes = data, pixels: Any = pixels) -> Verdict:
            return verify(read_document(data), pixels, config(), keys=issuer().keys).verdict

        trial.judge(what, data[:3000], check)
    trial.end(f"part {part}", kinds=16)


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
