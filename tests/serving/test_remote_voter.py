"""The ingress's view of its voters: a lost replica costs repetitions, never a vote, and never a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from macer_serve.errors import EngineMismatchError
from macer_serve.serving.problems import UnavailableError
from macer_serve.serving.remote_voter import RemoteVoter
from macer_serve.serving.voter_replica import VoterDescription, VoteRequest
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw, Votes

VOTER = VoterDescription(digest="sha256:a", engine="engine:1", batch_sizes=(64,), workers=1, passes=0)
Behaviour = Callable[[VoteRequest], Coroutine[Any, Any, list[Votes]]]


class Response:
    """A `DeploymentResponse` as far as it is used."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work, self.cancelled = work, False

    def __await__(self) -> Any:
        return self._work.__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A `DeploymentHandle` whose replicas behave as told."""

    def __init__(self, count: Behaviour, describe: VoterDescription | Exception = VOTER) -> None:
        self._count, self._described = count, describe
        self.responses: list[Response] = []
        self.count = self.describe = self  # `handle.count.remote(...)`, `handle.describe.remote()`

    def remote(self, request: VoteRequest | None = None) -> Response:
        response = Response(self._describe() if request is None else self._count(request))
        self.responses.append(response)
        return response

    async def _describe(self) -> VoterDescription:
        if isinstance(self._described, Exception):
            raise self._described
        return self._described


def votes_of(draw: Draw) -> Votes:
    """Three in four copies are voted class 1: a function of the draw alone, as a voter's votes are."""
    copies = np.arange(draw.start, draw.stop) % 4 != 0
    return np.bincount(copies.astype(np.int64), minlength=3)


async def honest(request: VoteRequest) -> list[Votes]:
    return [votes_of(draw) for draw in request.draws]


def mismatch() -> Exception:
    """The voter's own exception as awaiting a `DeploymentResponse` raises it."""
    return RayTaskError("count", "traceback", EngineMismatchError("other engine")).as_instanceof_cause()


def defect() -> Exception:
    return RayTaskError("count", "traceback", ZeroDivisionError("a defect")).as_instanceof_cause()


def drive(count: Behaviour) -> tuple[Certification, Handle]:
    handle = Handle(count)
    run = Certification(Plan(n0=100, n=1000, alpha=0.001), classes=3, sigma=0.25)
    asyncio.run(RemoteVoter(handle, 2, "sha256:a").drive(run, np.zeros((2, 2, 3), np.int32), b"s" * 16, VOTER))
    return run, handle


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions without their pauses."""
    pause = asyncio.sleep
    monkeypatch.setattr("macer_serve.serving.remote_voter.asyncio.sleep", lambda _: pause(0))


@pytest.mark.parametrize(
    "failure",
    [
        lambda: ActorDiedError(),
        lambda: ActorUnavailableError("unavailable", None),
        lambda: NodeDiedError("node"),
        lambda: DeploymentUnavailableError(DeploymentID("voter", "macer")),
        lambda: asyncio.CancelledError(),  # how a replica that is being stopped answers
        mismatch,
    ],
)
def test_a_lost_draw_is_asked_for_again_and_no_vote_changes(failure: Callable[[], BaseException]) -> None:
    undisturbed, _ = drive(honest)
    failures = iter([True, False, True, True, False, True])

    async def flaky(request: VoteRequest) -> list[Votes]:
        if next(failures, False):
            raise failure()
        return await honest(request)

    disturbed, handle = drive(flaky)
    assert disturbed.claim() == undisturbed.claim()
    assert disturbed.claim().class_id == 1
    assert len(handle.responses) == 18 + 4  # 1,100 votes in passes of 64, and four lost ones


@pytest.mark.parametrize("failure", [ActorDiedError, mismatch])
def test_where_no_replica_of_the_engine_is_left_the_request_is_refused(failure: Callable[[], Exception]) -> None:
    async def lost(request: VoteRequest) -> list[Votes]:
        raise failure()

    with pytest.raises(UnavailableError, match="no voter of the engine"):
        drive(lost)


def test_overload_is_said_at_once() -> None:
    async def overloaded(request: VoteRequest) -> list[Votes]:
        raise BackPressureError(5, 5)

    with pytest.raises(UnavailableError, match="overloaded"):
        drive(overloaded)


def test_a_defect_of_the_voter_is_not_repeated() -> None:
    asked = []

    async def broken(request: VoteRequest) -> list[Votes]:
        asked.append(request)
        raise defect()

    with pytest.raises(ZeroDivisionError):
        drive(broken)
    assert len(asked) <= 4  # the window


def test_cancelling_a_run_cancels_every_draw_in_flight() -> None:
    async def never(request: VoteRequest) -> list[Votes]:
        await asyncio.Event().wait()
        raise AssertionError

    async def cancelled_in_the_middle() -> Handle:
        handle = Handle(never)
        run = Certification(Plan(n0=100, n=1000), classes=3, sigma=0.25)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await RemoteVoter(handle, 2, "sha256:a").drive(run, np.zeros((2, 2, 3), np.int32), b"s" * 16, VOTER)
        assert len(asyncio.all_tasks()) == 1  # nothing runs on
        return handle

    handle = asyncio.run(cancelled_in_the_middle())
    assert len(handle.responses) == 3
    assert all(response.cancelled for response in handle.responses)


def test_a_voter_of_another_checkpoint_is_refused() -> None:
    replaced = VoterDescription(digest="sha256:b", engine="engine:2", batch_sizes=(64,), workers=1, passes=0)
    voter = RemoteVoter(Handle(honest, replaced), 1, "sha256:a")
    with pytest.raises(UnavailableError, match="replaced"):
        asyncio.run(voter.describe())


@pytest.mark.parametrize("failure", [ActorDiedError(), BackPressureError(5, 5), TimeoutError()])
def test_a_voter_that_does_not_answer_is_unavailable(failure: Exception) -> None:
    with pytest.raises(UnavailableError, match="no voter answers"):
        asyncio.run(RemoteVoter(Handle(honest, failure), 1, "sha256:a").describe())
