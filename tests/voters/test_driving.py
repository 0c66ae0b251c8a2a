"""A run that is driven for a while, elsewhere or here, ends as if it had been driven at once."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions, drive

SEED = bytes(16)
PLAN = Plan(n=20_000)


@pytest.fixture(scope="module")
def g() -> Iterator[SmoothedClassifier]:
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with torch.no_grad():  # votes of all classes
        module[1].weight.copy_(torch.eye(48)[:3])
        module[1].bias.zero_()
    options = VoterOptions(engine="torch", device="cpu", workers=2, compile=False)
    made = SmoothedClassifier.from_module(module, sigma=0.5, classes=3, input_shape=(3, 4, 4), options=options)
    yield made
    assert made.voter is not None
    made.voter.close()  # type: ignore[attr-defined]


def test_a_run_that_is_passed_on_ends_as_one_that_is_not(g: SmoothedClassifier) -> None:
    image = g.model_input(np.full((4, 4, 3), 128, np.uint8))
    assert g.voter is not None
    at_once = g.certification(image, PLAN)
    drive(at_once, image.x, SEED, g.voter)
    passed_on, times = g.certification(image, PLAN), 0
    while not passed_on.done:
        before = passed_on.drawn
        drive(passed_on, image.x, SEED, g.voter, for_s=0.0, small=times % 2 == 1)
        assert passed_on.drawn > before
        assert passed_on.done or passed_on.handed_out == passed_on.drawn  # no vote is awaited
        passed_on, times = pickle.loads(pickle.dumps(passed_on)), times + 1
    assert times > 10
    assert passed_on.claim() == at_once.claim()


def test_a_run_ends_with_its_voter() -> None:
    """Who waits for votes is woken."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    options = VoterOptions(engine="torch", device="cpu", workers=1, compile=False)
    own = SmoothedClassifier.from_module(module, sigma=0.5, classes=3, input_shape=(3, 4, 4), options=options)
    image = own.model_input(np.zeros((4, 4, 3), np.uint8))
    voter = own.voter
    assert voter is not None
    run = Certification(Plan(n=10**7), classes=3, sigma=0.5)
    with ThreadPoolExecutor(1) as threads:
        begun = threading.Event()
        driven = threads.submit(drive, run, image.x, SEED, voter, lambda run: begun.set())
        assert begun.wait(60)
        voter.close()  # type: ignore[attr-defined]
        with pytest.raises((CancelledError, RuntimeError)):
            driven.result(60)


@pytest.mark.parametrize("why", ["stopped", "halted"])
def test_a_run_is_left_at_once(g: SmoothedClassifier, why: str) -> None:
    image = g.model_input(np.zeros((4, 4, 3), np.uint8))
    run, halt = Certification(PLAN, classes=3, sigma=0.5), Future[None]()
    if why == "halted":
        halt.set_result(None)
    began = time.monotonic()
    assert g.voter is not None
    drive(run, image.x, SEED, g.voter, stop_s=0.0 if why == "stopped" else 60.0, halt=halt)
    assert not run.done
    assert time.monotonic() - began < 5
    g.voter.submit([]).result()  # the voter goes on
