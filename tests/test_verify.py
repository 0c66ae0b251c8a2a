"""Verification: what is honest holds, each changed field is named, and inventions that are consistent are found out."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binom, multinomial
from test_certificate import SECRET, SIGMA, Brightness, config, image
from torch import nn

from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.errors import ContradictedError, InconsistentError, MismatchError, ParameterError, VerificationError
from macer_serve.smoothed import SmoothedClassifier, drive
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.certification import Certification, Done, Draw
from macer_serve.smoothing.contradiction import LEVEL, evidence_against
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import SOFT_LEVELS, Proof, Votes
from macer_serve.verification import Verification, read_certificate, verify
from macer_serve.verification.engines import voter_options
from macer_serve.voters import Task, Voter
from macer_serve.voters.torch_voter import TorchVoter

IMAGES = Path(__file__).parent / "images"
OTHER = bytes(range(1, 33))
SEED = bytes(16)


def brightness(**options: Any) -> TorchVoter:
    plain: dict[str, Any] = {"batch": 300, "workers": 2, "precision": "fp32", "compile": False, "device": "cpu"}
    model = nn.Sequential(nn.Identity(), Brightness())
    return TorchVoter(model, input_shape=(3, 4, 4), sigma=SIGMA, **{**plain, **options})


@pytest.fixture(scope="module")
def voters() -> Iterator[dict[str, Voter]]:
    with brightness() as exact, brightness(noise="gaussian") as gaussian:
        yield {"exact": exact, "gaussian": gaussian}


@pytest.fixture(scope="module")
def g(voters: dict[str, Voter]) -> SmoothedClassifier:
    return SmoothedClassifier(config(), voter=voters["exact"], secret=SECRET)


def capped(g: SmoothedClassifier, pixels: Any, plan: Plan, cap: int) -> Certificate:
    question = g.question(pixels)
    run = g.certification(question, plan, cap=cap)
    assert g.voter is not None
    drive(run, question, g.voter)
    return g.certificate(question, run, g.voter.engine)


def interrupted(g: SmoothedClassifier, pixels: Any, plan: Plan, draws: int, *, deadline: bool = True) -> Certificate:
    """What is proved after so many draws of at most 300 copies."""
    question = g.question(pixels)
    run = g.certification(question, plan)
    assert g.voter is not None
    for _ in range(draws):
        draw = run.wants(300)
        assert isinstance(draw, Draw)
        run.add(draw, g.voter.submit([Task(question.x, question.seed, draw)]).result()[0])
    if deadline:
        run.stop("deadline")
    return g.certificate(question, run, g.voter.engine)


FIXED = Plan(n0=50, n=2000)
SOFT: dict[str, Any] = {"bound": "soft", "beta": 0.05}
PLANS: dict[str, tuple[int, Plan]] = {
    "fixed": (140, FIXED),
    "unanimous": (220, FIXED),
    "abstained": (128, FIXED),
    "predict": (140, Plan(n=500, mode="predict")),
    "predict abstained": (128, Plan(n=500, mode="predict")),
    "predict too few": (220, Plan(n=10, mode="predict")),
    "radius": (140, Plan(n0=50, n=20_000, radius=0.1)),
    "radius refuted": (140, Plan(n0=50, n=20_000, radius=0.9)),
    "radius at n": (140, Plan(n0=50, n=200, radius=0.25)),
    "tolerance": (140, Plan(n0=50, n=20_000, tolerance=0.1)),
    "tolerance at n": (140, Plan(n0=50, n=500, tolerance=0.001)),
    "two-sided": (133, Plan(n0=50, n=2000, bound="two-sided")),
    "two-sided radius": (140, Plan(n0=50, n=20_000, bound="two-sided", radius=0.1)),
    "two-sided tolerance": (140, Plan(n0=50, n=20_000, bound="two-sided", tolerance=0.1)),
    "soft": (150, Plan(n0=50, n=2000, **SOFT)),
    "soft radius": (150, Plan(n0=50, n=5000, radius=0.05, **SOFT)),
    "soft tolerance": (150, Plan(n0=50, n=5000, tolerance=0.1, **SOFT)),
    "soft abstained": (128, Plan(n0=50, n=500, **SOFT)),
}


class Made(dict[str, tuple[Any, Certificate]]):
    """By name: an image and its certificate."""

    def __repr__(self) -> str:  # hypothesis shows arguments
        return "Made"


@pytest.fixture(scope="module")
def honest(g: SmoothedClassifier) -> Made:
    """Honest certificates of every kind, with their images."""
    made = Made({name: (image(level), g.certify(image(level), plan)) for name, (level, plan) in PLANS.items()})
    pixels = image(140)
    tolerance = Plan(n0=50, n=20_000, tolerance=0.001)
    made |= {
        "fixed capped": (pixels, capped(g, pixels, FIXED, 500)),
        "tolerance capped": (pixels, capped(g, pixels, tolerance, 517)),
        "predict capped": (pixels, capped(g, pixels, Plan(n=500, mode="predict"), 100)),
        "fixed deadline": (pixels, interrupted(g, pixels, FIXED, 3)),
        "deadline in the selection": (pixels, interrupted(g, pixels, dataclasses.replace(FIXED, n0=500), 1)),
        "deadline at once": (pixels, interrupted(g, pixels, tolerance, 0)),
        "tolerance deadline": (pixels, interrupted(g, pixels, tolerance, 20)),
        "tolerance running": (pixels, interrupted(g, pixels, tolerance, 20, deadline=False)),
        "predict deadline": (pixels, interrupted(g, pixels, Plan(n=500, mode="predict"), 1)),
    }
    large = np.random.default_rng(0).integers(130, 190, (11, 9, 3)).astype(np.uint8)  # resized: off the lattice
    made["resized"] = (large, g.certify(large, FIXED))
    return made


def check(c: Certificate | dict[str, Any], pixels: Any, voters: dict[str, Voter] | None = None, **more: Any) -> Any:
    """The report on a record that has gone through JSON."""
    record = c if isinstance(c, dict) else c.to_json()
    certificate, answer = read_certificate(json.dumps(record).encode())
    make = None if voters is None else voters.__getitem__
    return verify(certificate, pixels, config(), answer=answer, voter=make, **{"seed": SEED, **more})


def lines(report: Verification) -> dict[str, str]:
    return {f.check: f.outcome for f in report.findings}


def failed(report: Verification) -> set[str]:
    return {f.check for f in report.failed}


# --- honest certificates ----------------------------------------------------------------------------------------------


def test_honest_certificates_hold(honest: Made, voters: dict[str, Voter]) -> None:
    ended = set()
    for name, (pixels, c) in honest.items():
        report = check(c, pixels, voters, secret=SECRET)
        assert report.error is None, (name, report.failed)
        assert set(lines(report).values()) == {"holds"}, name
        assert lines(report)["votes counted again"] == "holds"
        assert lines(report)["mac"] == "holds"
        ended.add((c.plan["mode"], c.plan["kind"], c.stopped, c.abstained))
    assert {stopped for *_, stopped, _ in ended} == {"n", "cap", "deadline", "radius", "futility", "tolerance", None}
    assert ("certify", "tolerance", "deadline", False) in ended  # proved something, though interrupted
    assert ("predict", "fixed", "n", False) in ended


def test_without_the_secret_fresh_votes_do_not_contradict_them(honest: Made, voters: dict[str, Voter]) -> None:
    """One seed each: a false alarm has probability at most 0.001 a certificate, 0.03 in all."""
    tested = 0
    for name, (pixels, c) in honest.items():
        report = check(c, pixels, voters, votes=3000)
        assert report.error is None, (name, report.failed)
        found = lines(report)
        assert found["mac"] == found["votes counted again"] == "not checked"
        tested += found["fresh votes"] == "holds"
        assert "mac" in report.verdict
    assert tested > 18


def test_plain_noise(voters: dict[str, Voter]) -> None:
    g = SmoothedClassifier(config(), voter=voters["gaussian"], noise="gaussian", secret=SECRET)
    c = g.certify(image(140), FIXED)
    report = check(c, image(140), voters, secret=SECRET)
    assert report.error is None
    assert any("floating-point error" in f.words for f in report.findings if f.check == "noise")


def test_no_votes_are_drawn_where_none_are_wanted(honest: Made) -> None:
    def refuse(kind: str) -> Voter:
        raise AssertionError("a network was warmed up")

    pixels, c = honest["fixed"]
    assert verify(c, pixels, config(), voter=refuse, votes=0).error is None
    assert verify(c, image(90), config(), voter=refuse).error is not None
    assert lines(verify(c, pixels, config()))["fresh votes"] == "not checked"


def test_a_record_from_javascript_holds(honest: Made, voters: dict[str, Voter]) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return int(value) if isinstance(value, float) and value.is_integer() else value

    for name in ("abstained", "fixed"):
        pixels, c = honest[name]
        assert set(lines(check(plain(c.to_json()), pixels, voters, secret=SECRET)).values()) == {"holds"}


def test_last_digits_may_be_those_of_another_library_and_no_more(honest: Made) -> None:
    pixels, c = honest["two-sided tolerance"]
    near = dataclasses.replace(c, p_lower=c.p_lower * (1 - 1e-14), p_upper=c.p_upper * (1 + 1e-14))
    assert verify(near, pixels, config()).error is None
    far = dataclasses.replace(c, p_lower=c.p_lower + 1e-8)
    assert failed(verify(far, pixels, config())) == {"p_lower"}


# --- one field changed ------------------------------------------------------------------------------------------------


def nearby(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(0, value - 1)] if value else [1]
    if isinstance(value, float):
        return [value * 1.01 + 1e-3, value * 0.99 + 2e-3]
    if isinstance(value, str):
        return [value + "x", ""]
    return ["x"]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a record that is neither an object nor a list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    record = copy.deepcopy(record)
    at: Any = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return record


def at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


# Where a changed field is found out, if not under its own name.
NAMED = {"n": "votes"}
# Another plan may prove the same by the same votes, or be about other soft votes: a mac or votes must tell.
SILENT = {("plan", name) for name in ("n", "radius", "tolerance", "beta")}


@pytest.mark.parametrize("kind", ["fixed", "abstained", "predict", "tolerance", "two-sided radius", "soft", "resized"])
def test_each_changed_field_is_named(kind: str, honest: Made) -> None:
    """Without the secret and without votes; the engine's name and the mac alone need more."""
    pixels, c = honest[kind]
    record = c.to_json()
    paths = [p for p in leaves(record) if p[0] not in ("engine", "mac", "version")]
    if kind == "soft":  # hundreds of levels
        paths = [p for p in paths if "votes" not in p[0]] + [p for p in paths if "votes" in p[0]][:9]
    looked = set()
    for path in paths:
        for value in nearby(at(record, path)):
            if value == at(record, path):
                continue
            try:
                report = check(changed(record, path, value), pixels)
            except ParameterError:
                continue
            top = path[0]
            level = kind == "soft" and "votes" in top and path[-1] == 0  # of a class that no bound rests on
            if report.error is None and (path in SILENT or level):
                assert failed(check(changed(record, path, value), pixels, secret=SECRET)) == {"mac"}
                continue
            assert isinstance(report.error, VerificationError), (path, value)
            assert any(NAMED.get(top, top) in name for name in failed(report)), (path, value, report.failed)
            if top == "radius":  # and no other: what follows from it is compared with what it should be
                assert failed(report) == {"radius"}
            looked.add(top)
    assert len(looked) >= 18


def test_votes_moved_between_classes_no_longer_prove_the_bound(honest: Made) -> None:
    pixels, c = honest["fixed"]
    votes = list(c.votes)
    votes[2], votes[0] = votes[2] + 20, votes[0] - 20
    report = check({**c.to_json(), "votes": votes}, pixels)
    assert failed(report) == {"p_lower", "p_upper", "radius", "upload_radius", "statement"}
    assert isinstance(report.error, InconsistentError)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("radius", {"stopped": "tolerance"}, "stopped"),
        ("radius", {"stopped": "futility"}, "stopped"),
        ("radius", {"stopped": None}, "stopped"),
        ("radius", {"stopped": "n"}, "stopped"),
        ("fixed", {"stopped": "cap"}, "stopped"),
        ("fixed", {"stopped": "deadline"}, "stopped"),
        ("tolerance capped", {"stopped": "deadline"}, "stopped"),  # 517 is no look
        ("tolerance deadline", {"stopped": "tolerance"}, "stopped"),
        ("fixed", {"mac": None}, "mac"),
        ("fixed", {"engine": "torch-cpu-fp32-t1-b300:0000000000000000"}, "mac"),
        ("tolerance", {"stopped": "cap"}, "mac"),  # lawful, but not what was issued
        ("deadline in the selection", {"n0": 1}, "n0, plan.n0"),
        ("fixed", {"selection_votes": [0, 0]}, "selection_votes"),
        ("fixed", {"selection_votes": [50, 0, 0]}, "class_id"),
    ],
)
def test_lawful_looking_changes(kind: str, changes: dict[str, Any], named: str, honest: Made) -> None:
    pixels, c = honest[kind]
    report = check({**c.to_json(), **changes}, pixels, secret=SECRET)
    assert named in failed(report)
    assert isinstance(report.error, InconsistentError)


def test_the_answer_around_a_certificate_must_say_what_it_says(honest: Made) -> None:
    pixels, c = honest["fixed"]
    record = c.to_json()
    answer = {k: record[k] for k in ("label", "class_id", "abstained", "radius", "upload_radius", "reason", "stopped")}
    answer |= {"certificate": record, "issued_at": "2026-01-01T00:00:00.000+00:00", "timing_ms": {"queue": 0.1}}
    assert check(answer, pixels).error is None
    assert failed(check({**answer, "radius": 0.9}, pixels)) == {"answer"}
    assert failed(check({**answer, "label": "dark"}, pixels)) == {"answer"}


# --- another image, another checkpoint, another secret ----------------------------------------------------------------


def test_another_image_or_checkpoint(honest: Made) -> None:
    pixels, c = honest["fixed"]
    brighter = pixels.copy()
    brighter[0, 0, 0] += 1
    for other in (brighter, image(139), pixels.transpose(1, 0, 2).copy(), np.zeros((8, 8, 3), np.uint8)):
        report = check(c, other)
        assert isinstance(report.error, MismatchError)
        assert lines(report)["fresh votes"] == "not checked"
    for changes in ({"name": "another"}, {"sigma": 0.5}, {"resize": 5}, {"classes": ("a", "b", "c", "d")}):
        report = verify(c, pixels, config(**changes), secret=SECRET)
        assert isinstance(report.error, MismatchError), changes
        assert failed(report) == {"model.digest"}
        assert lines(report)["label"] == "not checked"
        assert lines(report)["mac"] == "holds"


def test_another_secret(honest: Made, voters: dict[str, Voter]) -> None:
    pixels, c = honest["fixed"]
    report = check(c, pixels, voters, secret=OTHER)
    assert failed(report) == {"mac", "votes counted again"}
    assert isinstance(report.error, InconsistentError)


def test_another_engine_cannot_be_held_to_the_same_votes(honest: Made, g: SmoothedClassifier) -> None:
    pixels, c = honest["fixed"]
    with brightness(batch=100) as other:
        assert other.engine != c.engine
        report = verify(c, pixels, config(), secret=SECRET, voter=lambda kind: other, votes=1000)
    assert report.error is None
    found = {f.check: f for f in report.findings}
    assert found["votes counted again"].outcome == "not checked"
    assert "identical votes cannot be demanded" in found["votes counted again"].words
    assert found["fresh votes"].outcome == "holds"
    assert "by another engine" in found["fresh votes"].words


# --- consistent forgeries ---------------------------------------------------------------------------------------------


def forged(
    plan: Plan, votes: Any, selection: Any, pixels: Any, engine: str, secret: bytes | None = OTHER
) -> Certificate:
    """A record that follows from invented votes, under the forger's own mac, or none."""
    forger = SmoothedClassifier(config(), secret=secret)
    question = forger.question(pixels)
    run = Certification(plan, classes=3, sigma=SIGMA, tau=forger.noise.tau(question.x))
    invented = {"selection": np.array(selection), "estimation": np.array(votes)}
    while not isinstance(want := run.wants(), Done):
        assert isinstance(want, Draw)
        run.add(want, invented[want.purpose])
    made = forger.certificate(question, run, engine)
    return made if secret else dataclasses.replace(made, mac=None)


def histogram(n: int, *levels: int) -> Votes:
    votes = np.zeros((3, SOFT_LEVELS), np.int64)
    votes[range(3), levels] = n
    return votes


FORGERIES: dict[str, tuple[int, Plan, Any, Any]] = {
    "one-sided": (140, FIXED, [0, 0, 2000], [0, 0, 50]),
    "certifies an abstention": (128, FIXED, [200, 0, 1800], [0, 0, 50]),
    "another class": (140, FIXED, [1900, 0, 100], [50, 0, 0]),
    "two-sided, p_A": (133, Plan(n0=50, n=2000, bound="two-sided"), [0, 0, 2000], [0, 0, 50]),
    # p_A is as it should be, the runner-up's votes went to a class that nobody would test
    "two-sided, p_B": (133, Plan(n0=50, n=2000, bound="two-sided"), [240, 400, 1360], [0, 0, 50]),
    "soft, p_A": (150, Plan(n0=50, n=2000, **SOFT), histogram(2000, 10, 10, 1000), histogram(50, 0, 0, 1023)),
    "soft, p_B": (150, Plan(n0=50, n=2000, **SOFT), histogram(2000, 0, 0, 550), histogram(50, 0, 0, 1023)),
    "predict": (128 - 12, Plan(n=500, mode="predict"), [100, 0, 400], [0, 0, 0]),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_consistent_forgeries(kind: str, voters: dict[str, Voter]) -> None:
    level, plan, votes, selection = FORGERIES[kind]
    pixels = image(level)
    for secret in (OTHER, SECRET):  # SECRET: an issuer who lies
        c = forged(plan, votes, selection, pixels, voters["exact"].engine, secret)
        assert not c.abstained
        assert check(c, pixels).error is None  # it follows from itself
        report = check(c, pixels, voters, secret=SECRET)
        assert failed(report) == {"votes counted again"} | ({"mac"} if secret == OTHER else set())
        assert isinstance(report.error, InconsistentError)
    report = check(dataclasses.replace(c, mac=None), pixels, voters, secret=SECRET)
    assert failed(report) == {"mac", "votes counted again"}
    report = check(c, pixels, voters)
    assert failed(report) == {"fresh votes"}
    assert isinstance(report.error, ContradictedError)
    (words,) = [f.words for f in report.failed]
    p = "p_B <= " if kind.endswith("p_B") else "p_A >= "
    assert p in words


def test_a_small_overclaim_needs_the_secret(voters: dict[str, Voter], g: SmoothedClassifier) -> None:
    pixels = image(140)
    votes = list(g.certify(pixels, FIXED).votes)
    c = forged(FIXED, [votes[0] - 5, votes[1], votes[2] + 5], [0, 0, 50], pixels, voters["exact"].engine)
    assert check(c, pixels, voters).error is None
    assert check(c, pixels, voters, secret=SECRET).error is not None


# --- the contradiction test, exactly ----------------------------------------------------------------------------------


def contradicts(plan: Plan, proof: Proof, top: int, votes: Votes) -> bool:
    return any(e.contradicts for e in evidence_against(plan, proof, top, votes, tau=0.0))


@pytest.mark.parametrize("p", [0.51, 0.7, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("n", [50, 1000])
def test_the_false_alarm_of_one_sided_claims(p: float, n: int) -> None:
    """The claim p_A >= p is just true: the exact probability of calling it contradicted, over all outcomes."""
    proof = Proof(1, 0.1, p, 1.0 - p)
    alarm = [contradicts(Plan(), proof, 1, np.array([n - k, k])) for k in range(n + 1)]
    probability = float(binom.pmf(np.flatnonzero(alarm), n, p).sum())
    assert probability <= LEVEL
    if n == 1000 and p < 0.999:
        assert probability > LEVEL / 3  # not vacuous: at three times the level it would fail
        assert alarm[int(n * (p - 6 * np.sqrt(p * (1 - p) / n)))]


def outcomes(n: int) -> Iterator[tuple[int, int, int]]:
    return ((a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a))


@pytest.mark.parametrize(
    ("plan", "p", "claim"),
    [
        (Plan(bound="two-sided"), (0.25, 0.5, 0.25), (0.5, 0.25)),
        (Plan(bound="two-sided"), (0.4, 0.45, 0.15), (0.45, 0.4)),
        (Plan(bound="two-sided"), (0.1, 0.8, 0.1), (0.8, 0.1)),
        (Plan(mode="predict"), (0.45, 0.45, 0.1), (0.0, 1.0)),
        (Plan(mode="predict"), (1 / 3, 1 / 3, 1 / 3), (0.0, 1.0)),
    ],
)
def test_the_false_alarm_of_other_claims(plan: Plan, p: tuple[float, ...], claim: tuple[float, float]) -> None:
    n = 60
    proof = Proof(1, 0.0, *claim)
    bad = [v for v in outcomes(n) if contradicts(plan, proof, 1, np.array(v))]
    assert len(bad) > 0
    assert LEVEL / 50 < float(multinomial.pmf(bad, n, p).sum()) <= LEVEL


@pytest.mark.parametrize(("low", "high"), [(100, 900), (0, 1023), (400, 600)])
def test_the_false_alarm_of_soft_claims(low: int, high: int) -> None:
    """z takes two values just inside its levels; the claimed means are the true ones, the probability exact."""
    n, p = 300, 0.8
    mean = (p * high + (1 - p) * low) / SOFT_LEVELS  # as low as it may be for these levels
    worst = mean + 1 / SOFT_LEVELS  # and as high
    plan = Plan(bound="soft")
    probability = 0.0
    for k in range(n + 1):
        votes = np.zeros((3, SOFT_LEVELS), np.int64)
        votes[:, low] += n - k
        votes[:, high] += k
        above = contradicts(plan, Proof(1, 0.1, worst, 1.0), 1, votes)
        below = contradicts(plan, Proof(1, 0.1, 0.0, mean), 1, votes)
        assert not (above and below)
        probability += float(binom.pmf(k, n, p)) * (above or below)
    assert probability <= LEVEL
    votes[:] = 0
    votes[:, low] = n
    assert contradicts(plan, Proof(1, 0.1, worst, 1.0), 1, votes)


# --- hostile records --------------------------------------------------------------------------------------------------

HOSTILE = [
    b"", b"{", b"null", b"[]", b"5", b'"certificate"', b"\xff\xfe", b"\x00" * 100, b"[" * 200_000, b'{"a":' * 100_000,
    b"1" * 10_000, b"NaN", b'{"certificate": {}}', b'{"certificate": 5}', b'{"radius": 1, "radius": 2}', b"[1e999]",
    b" " * (17 * 2**20), b"[" + b"[]," * 2_000_000 + b"[]]", b'{"\\u001b[2J": 1}',
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=[f"{d[:12]!r}" for d in HOSTILE])
def test_what_is_no_certificate(data: bytes) -> None:
    with pytest.raises(ParameterError) as caught:
        read_certificate(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


STRANGE = st.sampled_from(
    [
        None, True, -1, 0, 1, 2, 2**31, 2**52, 2**70, 1e300, -1e-300, 5e-324, 0.5, -0.0, "", "x", "\ud800", "\x1b[2J",
        [], [[]], {}, {"a": 1}, [1, 2], [-1], ["a"], [[1]], [[[1, 2]]], [[[-1, 5]]], "n", "soft", "predict",
    ]
)  # fmt: skip


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_fields_end_in_words(honest: Made, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["fixed", "tolerance", "two-sided", "soft", "predict", "resized", "abstained"]))
    pixels, c = honest[name]
    record: Any = c.to_json()
    for _ in range(data.draw(st.integers(1, 3))):
        path: tuple[Any, ...] = (data.draw(st.sampled_from(sorted(record))),)
        while isinstance(at(record, path), dict | list) and at(record, path) and data.draw(st.booleans()):
            inner = at(record, path)
            path = (*path, data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner)))))
        record = changed(record, path, data.draw(STRANGE))
    try:
        report = check(record, pixels, secret=SECRET)
    except ParameterError:
        return
    json.dumps(report.to_json())
    assert all(f.words.isprintable() for f in report.findings)


@pytest.mark.parametrize("votes", [-1, 10**8])
def test_votes_out_of_range(votes: int, honest: Made) -> None:
    pixels, c = honest["fixed"]
    with pytest.raises(ParameterError, match="votes must lie"):
        verify(c, pixels, config(), votes=votes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch-cpu-fp32-t1-b64", {"device": "cpu", "compile": False, "batch": 64, "precision": "fp32"}),
        ("torch-cpu-bf16-compiled-t1-b256", {"device": "cpu", "compile": True, "batch": 256}),
        ("torch-cpu-fp32-t1-b9999", {"device": None}),
        ("torch-cpu-fp32-t1-b0", {"device": None}),
        ("onnx", {"device": None}),
    ],
)
def test_an_engine_like_the_records(name: str, options: dict[str, Any]) -> None:
    assert voter_options(f"{name}:0123456789abcdef") == options
    assert voter_options(name) == {"device": None}


# --- the command ------------------------------------------------------------------------------------------------------

SHIP = IMAGES / "0001-ship.png"


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `secret` and `ship.json`: the bundled checkpoint's certificate of a photograph."""
    folder = tmp_path_factory.mktemp("issued")
    (folder / "secret").write_bytes(SECRET.hex().encode() + b"\n")
    options: dict[str, Any] = {"device": "cpu", "batch": 64, "workers": 2, "precision": "fp32", "compile": False}
    g = SmoothedClassifier.load("bundled:cifar10", secret=SECRET.hex().encode(), **options)
    c = g.certify(SHIP, Plan(n0=30, n=400, tolerance=0.3))
    assert isinstance(g.voter, TorchVoter)
    g.voter.close()
    (folder / "ship.json").write_text(json.dumps(c.to_json(), indent=2))
    return folder


def macer(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


def edited(folder: Path, **changes: Any) -> Path:
    record = {**json.loads((folder / "ship.json").read_text()), **changes}
    path = folder / "edited.json"
    path.write_text(json.dumps(record))
    return path


def test_the_command_on_an_honest_certificate(issued: Path) -> None:
    result = macer(issued / "ship.json", SHIP, "--secret-file", issued / "secret")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "everything that was checked holds"
    assert "holds          mac: " in result.stdout
    assert "holds          votes counted again: " in result.stdout
    result = macer(issued / "ship.json", SHIP, "--votes", 300, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["holds"], report["exit_code"]) == (True, 0)
    assert {f["check"]: f["outcome"] for f in report["findings"]}["fresh votes"] == "holds"


def test_the_commands_exit_codes(issued: Path, tmp_path: Path) -> None:
    config = load_config("bundled:cifar10")
    cases: list[tuple[list[object], int, str]] = [
        ([edited(issued, radius=3.0), SHIP], 10, "forged: radius"),
        ([issued / "ship.json", IMAGES / "0000-cat.png"], 11, "input.digest"),
    ]
    for arguments, code, words in cases:
        result = macer(*arguments)
        assert result.exit_code == code, result.output
        assert words in result.stderr
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"another secret of some length")
    result = macer(issued / "ship.json", SHIP, "--secret-file", wrong)
    assert result.exit_code == 10
    assert "mac, votes counted again" in result.stderr
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config.to_json(), "name": "other"}))
    assert macer(issued / "ship.json", SHIP, "--checkpoint", other).exit_code == 11


def test_the_command_on_a_forgery_that_is_consistent(issued: Path) -> None:
    c = Certificate.from_json(json.loads((issued / "ship.json").read_text()))
    forger = SmoothedClassifier(load_config("bundled:cifar10"))
    question = forger.question(SHIP)
    run = forger.certification(question, Plan(n0=30, n=1000))
    while isinstance(want := run.wants(), Draw):
        run.add(want, np.eye(10, dtype=np.int64)[8] * len(want))
    (issued / "forged.json").write_text(json.dumps(forger.certificate(question, run, c.engine).to_json()))
    result = macer(issued / "forged.json", SHIP, "--votes", 1000)
    assert result.exit_code == 12, result.output
    assert "does not hold  fresh votes: " in result.stdout
    assert "contradicted by fresh votes" in result.stderr


def test_the_command_on_what_cannot_be_read(issued: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.json"
    junk.write_bytes(b"[" * 100_000)
    good = issued / "ship.json"
    assert macer(junk, SHIP).exit_code == 2
    assert macer(tmp_path / "absent.json", SHIP).exit_code == 2
    assert macer(good, tmp_path / "absent.png").exit_code == 8
    assert macer(good, good).exit_code == 8
    assert macer(good, SHIP, "--checkpoint", "nowhere").exit_code == 3
    assert macer(good, SHIP, "--device", "tpu").exit_code == 7
    assert macer(good, SHIP, "--votes", -1).exit_code == 2
    short = tmp_path / "short"
    short.write_bytes(b"short")
    assert macer(good, SHIP, "--secret-file", short).exit_code == 2
