"""Inventions that follow from themselves are found out by the signature, the seed proof, or the votes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from brightness import SEEDS, SIGMA, config, image, issuer
from checking import FIXED, SOFT, Made, check, failed

from macer_serve.issuing import Issuer, SeedSource
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certification import Certification, Done
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.policy import policy_digest
from macer_serve.smoothing.votes import SOFT_LEVELS, Draw, Votes
from macer_serve.verification import Verdict
from macer_serve.voters import Voter, drive

OTHER = Issuer.new()


def forged(plan: Plan, votes: Any, selection: Any, pixels: Any, engine: str, forger: SeedSource) -> dict[str, Any]:
    """Returns a record that follows from invented votes, under the seed that the input has with this issuer."""
    g = SmoothedClassifier(config(), issuer=forger)
    model_input = g.model_input(pixels)
    run = Certification(plan, classes=3, sigma=SIGMA, tau=g.noise.tau(model_input.x))
    invented = {"selection": np.array(selection), "estimation": np.array(votes)}
    while not isinstance(want := run.wants(), Done):
        assert isinstance(want, Draw)
        run.add(want, invented[want.purpose])
    return g.certificate(model_input, run, g.seed_proof(model_input, plan), engine).to_json()


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
    pixels, engine = image(level), voters["exact"].engine
    # An issuer who lies signs what follows from itself: only the recount tells.
    record = forged(plan, votes, selection, pixels, engine, issuer())
    assert not record["abstained"]
    assert check(record, pixels).verdict is Verdict.CONSISTENT
    report = check(record, pixels, voters)
    assert (report.verdict, failed(report)) == (Verdict.CONTRADICTED, {"votes counted again"})
    # Somebody else has no key, and no seed.
    record = forged(plan, votes, selection, pixels, engine, OTHER)
    assert check(record, pixels, voters, by=OTHER).verdict is Verdict.OTHER_KEY
    assert check(record, pixels, voters, sign=False).verdict.refutes
    record = forged(plan, votes, selection, pixels, engine, SEEDS)
    assert check(record, pixels, voters, sign=False).verdict is Verdict.NOT_AUTHENTICATED


def test_a_small_overclaim_is_contradicted(voters: dict[str, Voter], g: SmoothedClassifier) -> None:
    pixels = image(140)
    votes = list(g.certify(pixels, FIXED).votes)
    moved = [votes[0] - 1, votes[1], votes[2] + 1]
    record = forged(FIXED, moved, [0, 0, 50], pixels, voters["exact"].engine, issuer())
    assert check(record, pixels).verdict is Verdict.CONSISTENT
    assert check(record, pixels, voters).verdict is Verdict.CONTRADICTED


POLICIES: list[Plan] = [
    Plan(n0=50, n=2001), Plan(n0=50, n=1000), Plan(n0=51, n=2000), Plan(n0=50, n=2000, bound="two-sided"),
    Plan(n0=50, n=2000, tolerance=0.05), Plan(n0=50, n=2000, radius=0.1), Plan(n=2000, mode="predict"),
    Plan(n0=50, n=2000, **SOFT), Plan(n0=50, n=2000, bound="soft", beta=0.06),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_chosen_after_the_votes_is_not_proved(policy: Plan, voters: dict[str, Voter]) -> None:
    """The issuer certifies by another policy on the noise of `FIXED`, whose votes are known, and signs."""
    pixels = image(140)
    g = SmoothedClassifier(config(), voter=voters["exact"], issuer=issuer())
    model_input = g.model_input(pixels)
    known = g.seed_proof(model_input, FIXED)
    run = g.certification(model_input, policy)
    drive(run, model_input.x, known.seed, voters["exact"])
    c = g.certificate(model_input, run, known, voters["exact"].engine)
    for record in (c.to_json(), {**c.to_json(), "policy": policy_digest(FIXED, c.noise)}):
        report = check(record, pixels, voters)
        assert report.verdict is Verdict.POLICY_NOT_FIXED, report.reasons


def test_a_seed_of_another_input_or_model_is_not_proved(voters: dict[str, Voter], honest: Made) -> None:
    pixels, c = honest["fixed"]
    for name in ("unanimous", "tolerance", "resized"):
        stolen = {**c.to_json(), "seed_proof": honest[name][1].seed_proof}
        assert check(stolen, pixels, voters).verdict is Verdict.POLICY_NOT_FIXED
    for proof in ("", "AAAA", c.seed_proof[:-1], c.seed_proof + "=", "\ud800"):  # type: ignore[index, operator]
        assert (
            check({**c.to_json(), "seed_proof": proof}, pixels, voters, sign=False).verdict.refutes or proof == "AAAA"
        )
        assert check({**c.to_json(), "seed_proof": proof}, pixels, voters).verdict is Verdict.POLICY_NOT_FIXED
