"""Certificates say what was proved, are signed whole, and repeat under the same seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from brightness import SEEDS, SIGMA, Brightness, config, image, issuer
from cases import voter_of
from torch import nn

from macer_serve.errors import ParameterError
from macer_serve.issuing import EvaluationSeed, Issuer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.certificate import Certificate, reason, statement
from macer_serve.smoothing.certification import Claim
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.radius import one_sided_radius, round_down
from macer_serve.smoothing.votes import Draw, from_record
from macer_serve.voters import Task, drive
from macer_serve.voters.batched import BatchedVoter

PLAN = Plan(n0=50, n=2000, alpha=0.001)


@pytest.fixture(scope="module")
def voter() -> Iterator[BatchedVoter]:
    with voter_of(
        nn.Sequential(nn.Identity(), Brightness()), input_shape=(3, 4, 4), sigma=SIGMA,
        device="cpu", batch=300, workers=2, precision="fp32", compile=False,
    ) as voter:  # fmt: skip
        yield voter


@pytest.fixture(scope="module")
def g(voter: BatchedVoter) -> SmoothedClassifier:
    return SmoothedClassifier(config(), voter=voter, issuer=issuer())


@pytest.fixture(scope="module")
def certified(g: SmoothedClassifier) -> Certificate:
    return g.certify(image(140), PLAN)


@pytest.fixture(scope="module")
def abstained(g: SmoothedClassifier) -> Certificate:
    return g.certify(image(128), PLAN)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_everything_follows_from_the_record(certified: Certificate) -> None:
    c = certified
    assert (c.label, c.class_id, c.abstained, c.reason, c.stopped) == ("bright", 2, False, None, "n")
    assert sum(c.votes) == c.n == PLAN.n
    assert sum(c.selection_votes) == c.n0 == PLAN.n0
    assert c.votes[2] < c.n  # not unanimous: the arithmetic below says something
    exact = clopper_pearson_lower(c.votes[2], c.n, c.alpha)
    assert exact - c.tau - 3e-16 <= c.p_lower < exact
    assert 0.0 < c.tau < 1e-12
    assert c.radius == round_down(one_sided_radius(c.p_lower, c.sigma)) > 0.0
    assert c.upload_radius == c.radius  # nothing was resampled
    assert (c.sigma, c.alpha, c.bound, c.noise) == (SIGMA, PLAN.alpha, "clopper-pearson", "exact-lattice/1")
    assert c.plan == PLAN.to_json()
    assert c.model == {"name": "brightness", "digest": config().digest}
    assert c.input["shape"] == [3, 4, 4]
    assert c.engine.startswith("torch-cpu-fp32-b300:")


def test_the_statement_names_confidence_radius_and_norm(certified: Certificate) -> None:
    assert certified.statement == (
        f"With confidence 99.9%, no change of L2 norm below {certified.radius:.6f} to the model input "
        "(pixel values in [0, 1]) changes the smoothed classifier's class."
    )


def claim(**changes: Any) -> Claim:
    plain = Claim(
        class_id=None, radius=0.0, p_lower=0.49999, top_class=2, votes=(960, 10, 1030), n=2000,
        selection_votes=(20, 0, 30), p_upper=0.50001, stopped="n",
        proof_votes=(960, 10, 1030), proof_n=2000,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("alpha", "confidence"),
    [
        (0.001, "99.9%"),
        (0.05, "95%"),
        (0.0001, "99.99%"),
        (1e-6, "99.9999%"),
        (4e-11, "99.999999996%"),
        (0.00100000000049, "99.899999999951%"),
        (1e-12, "99.9999999999%"),
        (0.3, "70%"),
    ],
)
def test_confidence_is_not_rounded_up(alpha: float, confidence: str) -> None:
    said = statement(claim(class_id=2, radius=0.516204, p_lower=0.98), Plan(alpha=alpha), "exact-lattice/1")
    assert said.startswith(f"With confidence {confidence}, no change of L2 norm below 0.516204 ")


def test_the_statement_of_plain_noise_says_so() -> None:
    said = statement(claim(class_id=2, radius=0.5, p_lower=0.98), Plan(), "gaussian/1")
    assert "up to floating-point error of the added noise" in said


def test_an_abstention_says_so_and_why(abstained: Certificate) -> None:
    c = abstained
    assert (c.label, c.class_id, c.abstained, c.radius, c.upload_radius) == (None, None, True, 0.0, 0.0)
    assert c.statement == "Nothing is certified: the smoothed classifier abstains on this input."
    assert c.reason is not None
    assert c.reason.startswith("votes were split: ")
    assert "a certificate needs more than 50 %" in c.reason


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, ["votes were split: bright 51.5 %, dark 48.0 %", "only 49.9 % of the noise"]),  # 49.999: not rounded up
        ({"stopped": "deadline", "n": 700, "p_lower": 0.0}, ["the deadline was reached after 700 of 2,000 votes"]),
        ({"stopped": "cap", "n": 500, "p_lower": 0.0}, ["the cap on votes was reached after 500 of 2,000 votes"]),
        ({"stopped": None, "n": 500, "p_lower": 0.0}, ["undecided: 500 of 2,000 votes"]),
        ({"stopped": None, "top_class": None, "n": 2000, "p_lower": 0.0}, ["undecided"]),
    ],
)
def test_reasons_in_words(state: dict[str, Any], words: list[str]) -> None:
    said = reason(claim(**state), PLAN, config().classes)
    assert said is not None
    for part in words:
        assert part in said
    assert reason(claim(class_id=2, radius=0.1, p_lower=0.7), PLAN, config().classes) is None


def test_a_capped_run_is_certified_nothing(g: SmoothedClassifier) -> None:
    model_input, proof = g.model_input(image(255 - 20)), g.seed_proof(g.model_input(image(255 - 20)), PLAN)
    run = g.certification(model_input, PLAN, cap=500)
    assert g.voter is not None
    drive(run, model_input.x, proof.seed, g.voter)
    c = g.certificate(model_input, run, proof, g.voter.engine)
    assert c.abstained
    assert (c.n, c.radius, c.upload_radius, c.stopped, c.votes) == (500, 0.0, 0.0, "cap", (0, 0, 500))


# --- the record and its signature ------------------------------------------------------------------------------------


def test_json_and_back(certified: Certificate, abstained: Certificate) -> None:
    for c in (certified, abstained):
        again = Certificate.from_json(json.loads(json.dumps(c.to_json())))
        assert again == c
        assert again.canonical() == c.canonical()


def other(value: Any) -> list[Any]:
    """Values near the given one, of its kind and of others."""
    if isinstance(value, bool):
        return [not value, int(value)]
    if isinstance(value, int):
        return [value + 1, float(value), str(value)]
    if isinstance(value, float):
        return [math.nextafter(value, math.inf), value + 1e-6, -1.0 if value == 0 else -value]
    if isinstance(value, str):
        return [value + " ", value.upper() + "x", None, "\ud800"]
    if value is None:
        return ["", 0, False]
    if isinstance(value, list):
        return [[*value, 0], value[:-1], [*other(value[0])[:1], *value[1:]]]
    assert isinstance(value, dict)
    return [{**value, key: changed} for key in value for changed in other(value[key])[:1]] + [{**value, "extra": 1}]


def test_the_signature_covers_every_field(g: SmoothedClassifier, certified: Certificate) -> None:
    record, jws = certified.to_json(), g.signed(certified)
    assert jws is not None
    assert issuer().keys.open(jws).payload == certified.canonical()
    assert json.loads(certified.canonical()) == record
    changes = 0
    for name in (f.name for f in dataclasses.fields(Certificate)):
        for value in other(record[name]):
            try:
                forged = Certificate.from_json({**record, name: value})
            except ParameterError:
                continue
            changes += 1
            assert forged.canonical() != certified.canonical(), (name, value)
    assert changes > 60


def test_a_record_that_went_through_javascript_is_the_same(certified: Certificate, abstained: Certificate) -> None:
    """JSON.stringify writes 1 for 1.0: the page offers certificates that it has parsed."""
    for c in (certified, abstained):
        record = c.to_json()
        assert record["fit"]["norm"] == 1.0
        record["fit"]["norm"] = 1
        record = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in record.items()}
        again = Certificate.from_json(json.loads(json.dumps(record)))
        assert again.canonical() == c.canonical()
        assert again == c


def test_seeds_of_an_evaluator_sign_nothing(voter: BatchedVoter) -> None:
    unsigned = SmoothedClassifier(config(), voter=voter, issuer=SEEDS)
    c = unsigned.certify(image(140), PLAN)
    assert (c.key_id, c.seed_proof, unsigned.signed(c)) == (None, None, None)
    assert c == SmoothedClassifier(config(), voter=voter, issuer=SEEDS).certify(image(140), PLAN)


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: [r],
        lambda r: {k: v for k, v in r.items() if k != "votes"},
        lambda r: {**r, "surprise": 1},
        lambda r: {**r, "version": 1},
        lambda r: {**r, "votes": 5},
        lambda r: {**r, "votes": "2000"},
        lambda r: {**r, "mac": "hmac-sha256:00"},
        lambda r: {**r, "seed_proof": 5},
        lambda r: {**r, "n": 2000.0},
        lambda r: {**r, "radius": "0.5"},
        lambda r: {**r, "abstained": 0},
        lambda r: {**r, "class_id": True},
        lambda r: {**r, "plan": []},
        lambda r: {**r, "statement": None},
    ],
)
def test_what_is_no_certificate_is_refused(certified: Certificate, damage: Any) -> None:
    with pytest.raises(ParameterError):
        Certificate.from_json(damage(certified.to_json()))


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_the_same_image_meets_the_same_noise(
    g: SmoothedClassifier, voter: BatchedVoter, certified: Certificate
) -> None:
    assert g.certify(image(140), PLAN) == certified
    # In another process with the same key, too; and whatever the number of workers.
    with voter_of(
        nn.Sequential(nn.Identity(), Brightness()), input_shape=(3, 4, 4), sigma=SIGMA,
        device="cpu", batch=300, workers=1, precision="fp32", compile=False,
    ) as one_worker:  # fmt: skip
        again = SmoothedClassifier(config(), voter=one_worker, issuer=issuer()).certify(image(140), PLAN)
    assert json.dumps(again.to_json()) == json.dumps(certified.to_json())


def test_another_image_key_model_or_policy_means_another_seed(g: SmoothedClassifier) -> None:
    def seed(g: SmoothedClassifier, pixels: Any, plan: Plan = PLAN) -> bytes:
        return g.seed_proof(g.model_input(pixels), plan).seed

    pixels = image(140)
    brighter = pixels.copy()
    brighter[0, 0, 0] += 1
    wide = dataclasses.replace(config(), input_shape=(3, 4, 2))
    policies = [
        dataclasses.replace(PLAN, **changes)
        for changes in (
            {"n": 2001}, {"n0": 51}, {"bound": "two-sided"}, {"bound": "soft"}, {"bound": "soft", "beta": 1.0},
            {"radius": 0.1}, {"mode": "predict"},
        )
    ]  # fmt: skip
    seeds = [
        seed(g, pixels),
        seed(g, brighter),
        seed(g, pixels.transpose(1, 0, 2).copy()),
        seed(SmoothedClassifier(config(), issuer=Issuer.new()), pixels),
        seed(SmoothedClassifier(config(sigma=0.5), issuer=issuer()), pixels),
        seed(SmoothedClassifier(wide, issuer=issuer()), pixels),
        seed(SmoothedClassifier(config(), issuer=issuer(), noise="gaussian"), pixels),
        seed(SmoothedClassifier(config(), issuer=SEEDS), pixels),
        *(seed(g, pixels, policy) for policy in policies),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(len(seed) == 16 for seed in seeds)
    # A request's own choices are no part of the policy: they read the same votes.
    sequential = {seed(g, pixels, Plan(n0=50, n=2000, alpha=a, **k)) for a in (0.001, 0.05) for k in REQUESTS}
    assert sequential == {seed(g, pixels, policies[5])}


REQUESTS: list[dict[str, Any]] = [{"radius": 0.1}, {"radius": 0.7}, {"tolerance": 0.05}, {"tolerance": 0.5}]


def test_without_an_issuer_seeds_are_random(voter: BatchedVoter) -> None:
    one, two = (SmoothedClassifier(config(), voter=voter) for _ in range(2))
    seeds = [g.seed_proof(g.model_input(image(140)), PLAN).seed for g in (one, one, two)]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("seed", [b"", b"short", bytes(15)])
def test_a_short_evaluation_seed_is_refused(seed: bytes) -> None:
    with pytest.raises(ParameterError, match="at least 16 bytes"):
        EvaluationSeed(seed)


def test_requests_of_one_policy_read_the_same_votes(g: SmoothedClassifier) -> None:
    """No radius, tolerance, cap or alpha buys a redraw: the votes of the shorter run are the first of the longer."""
    requests: list[dict[str, Any]] = [{"tolerance": 0.3}, {"tolerance": 0.01}, {"radius": 0.2}]
    runs = [g.certify(image(133), Plan(n0=50, n=5000, **request)) for request in requests]
    assert len({c.n for c in runs}) == 3
    model_input = g.model_input(image(133))
    proof = g.seed_proof(model_input, Plan(n0=50, n=5000, tolerance=0.1))
    assert g.voter is not None
    for c in runs:
        (votes,) = g.voter.submit([Task(model_input.x, proof.seed, Draw("estimation", 0, c.n))]).result()
        assert c.votes == tuple(votes.tolist())
        assert c.seed_proof == proof.text
        assert c.selection_votes == runs[0].selection_votes


@pytest.mark.parametrize(
    "record",
    [
        [[[-1, 5]], [[0, 5]]],  # a level counted from the end
        [[[3, 2], [3, 3]], [[0, 5]]],  # a level twice
        [[[3, 0], [4, 5]], [[0, 5]]],  # an empty one
        [[[5, 1], [4, 4]], [[0, 5]]],  # out of order
        [[[1024, 5]], [[0, 5]]],
        [[[3, 5]], [[0, 4]]],  # classes of different n
        [[[3, 2**62], [4, 2**62], [5, 2**62], [6, 2**62]], [[0, 2**62]]],  # sums that wrap
        [[[3, 2**80]], [[0, 5]]],
        [[]] * 100_000,
        [],
    ],
)
def test_soft_votes_have_one_form(record: Any) -> None:
    with pytest.raises(ParameterError, match="not votes"):
        from_record(record, soft=True)
    with pytest.raises(ParameterError, match="not votes"):
        from_record([2**62, 2**62, 2**62, 2**62], soft=False)
