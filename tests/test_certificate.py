"""Certificates say what was proved, bind it with a mac, and repeat under the secret."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from brightness import SECRET, SIGMA, Brightness, config, image
from cases import voter_of
from torch import nn

from macer_serve.errors import ParameterError
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.certificate import Certificate, reason, statement
from macer_serve.smoothing.certification import Claim
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.radius import one_sided_radius, round_down
from macer_serve.smoothing.seeds import MIN_SECRET_BYTES, derive_seed, mac, mac_holds, new_secret
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
    return SmoothedClassifier(config(), voter=voter, secret=SECRET)


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
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("alpha", "confidence"), [(0.001, "99.9%"), (0.05, "95%"), (0.0001, "99.99%"), (1e-6, "99.9999%")]
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
    question = g.question(image(255 - 20))
    run = g.certification(question, PLAN, cap=500)
    assert g.voter is not None
    drive(run, question.x, question.seed, g.voter)
    c = g.certificate(question, run, g.voter.engine)
    assert c.abstained
    assert (c.n, c.radius, c.upload_radius, c.stopped, c.votes) == (500, 0.0, 0.0, "cap", (0, 0, 500))
    assert c.is_authentic(SECRET)


# --- the record and its mac ------------------------------------------------------------------------------------------


def test_json_and_back(certified: Certificate, abstained: Certificate) -> None:
    for c in (certified, abstained):
        again = Certificate.from_json(json.loads(json.dumps(c.to_json())))
        assert again == c
        assert again.canonical() == c.canonical()
        assert again.is_authentic(SECRET)


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


def test_the_mac_covers_every_field(certified: Certificate) -> None:
    record = certified.to_json()
    assert certified.is_authentic(SECRET)
    assert not certified.is_authentic(bytes(32))
    changes = 0
    for name in (f.name for f in dataclasses.fields(Certificate)):
        for value in other(record[name]):
            if name == "mac" and value is None:
                continue
            try:
                forged = Certificate.from_json({**record, name: value})
            except ParameterError:
                continue
            changes += 1
            assert not forged.is_authentic(SECRET), (name, value)
    assert changes > 60
    assert not dataclasses.replace(certified, mac=None).is_authentic(SECRET)


def test_a_record_that_went_through_javascript_is_authentic(certified: Certificate, abstained: Certificate) -> None:
    """JSON.stringify writes 1 for 1.0: the page offers certificates that it has parsed."""
    for c in (certified, abstained):
        record = c.to_json()
        assert record["fit"]["norm"] == 1.0
        record["fit"]["norm"] = 1
        record = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in record.items()}
        again = Certificate.from_json(json.loads(json.dumps(record)))
        assert again.is_authentic(SECRET)
        assert again == c


def test_a_mac_does_not_serve_as_a_seed_nor_the_reverse() -> None:
    """One secret, two uses: their messages cannot coincide."""
    seed = derive_seed(SECRET, "sha256:a", "sha256:b")
    message = b"seed\0sha256:a\0sha256:b"
    assert seed.hex() not in mac(SECRET, message)
    assert mac_holds(SECRET, message, mac(SECRET, message))
    assert not mac_holds(SECRET, message, mac(SECRET, message).upper())
    assert not mac_holds(SECRET, message, "\ud800")


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: [r],
        lambda r: {k: v for k, v in r.items() if k != "votes"},
        lambda r: {**r, "surprise": 1},
        lambda r: {**r, "version": 1},
        lambda r: {**r, "votes": 5},
        lambda r: {**r, "votes": "2000"},
        lambda r: {**r, "mac": 5},
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
    # In another process with the same secret, too; and whatever the number of workers.
    with voter_of(
        nn.Sequential(nn.Identity(), Brightness()), input_shape=(3, 4, 4), sigma=SIGMA,
        device="cpu", batch=300, workers=1, precision="fp32", compile=False,
    ) as one_worker:  # fmt: skip
        again = SmoothedClassifier(config(), voter=one_worker, secret=SECRET).certify(image(140), PLAN)
    assert json.dumps(again.to_json()) == json.dumps(certified.to_json())


def test_another_image_secret_or_checkpoint_means_another_seed(g: SmoothedClassifier, voter: BatchedVoter) -> None:
    pixels = image(140)
    changed = pixels.copy()
    changed[0, 0, 0] += 1
    wide = dataclasses.replace(config(), input_shape=(3, 4, 2))
    seeds = {
        g.question(pixels).seed,
        g.question(changed).seed,
        g.question(pixels.transpose(1, 0, 2).copy()).seed,
        SmoothedClassifier(config(), voter=voter, secret=bytes(32)).question(pixels).seed,
        SmoothedClassifier(config(name="another"), voter=voter, secret=SECRET).question(pixels).seed,
        SmoothedClassifier(wide, secret=SECRET).question(pixels).seed,
    }
    assert len(seeds) == 6
    assert all(len(seed) == 16 for seed in seeds)


def test_without_a_secret_one_is_drawn(voter: BatchedVoter) -> None:
    one, two = (SmoothedClassifier(config(), voter=voter).question(image(140)).seed for _ in range(2))
    assert one != two
    assert len({new_secret() for _ in range(10)}) == 10


@pytest.mark.parametrize("secret", [b"", b"short", bytes(MIN_SECRET_BYTES - 1)])
def test_a_short_secret_is_refused(secret: bytes) -> None:
    with pytest.raises(ParameterError, match="at least 16 bytes"):
        SmoothedClassifier(config(), secret=secret)


def test_a_longer_plan_reads_the_same_votes_further(g: SmoothedClassifier, voter: BatchedVoter) -> None:
    """No plan buys a redraw: the votes at n = 2,000 are the first 2,000 of those at n = 5,000."""
    short, long = (g.certify(image(133), Plan(n0=50, n=n, alpha=0.001)) for n in (2000, 5000))
    question = g.question(image(133))
    first, rest = (
        voter.submit([Task(question.x, question.seed, Draw("estimation", *piece))]).result()[0]
        for piece in [(0, 2000), (2000, 5000)]
    )
    assert min(first[[0, 2]]) > 100  # far from unanimous
    assert short.votes == tuple(first.tolist())
    assert long.votes == tuple((first + rest).tolist())
    assert short.selection_votes == long.selection_votes
    other_alpha = g.certify(image(133), Plan(n0=50, n=2000, alpha=0.05))
    assert other_alpha.votes == short.votes


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
