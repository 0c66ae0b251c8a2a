"""The ingress's view of its voters: a lost replica costs repetitions, never a vote, and never a crash."""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from macer_serve.errors import EngineMismatchError
from macer_serve.serving.problems import OverloadedError, UnavailableError
from macer_serve.serving.remote_voter import RemoteVoter
from macer_serve.serving.voter_model import ModelHandle, VoterModel
from macer_serve.serving.voter_replica import DriveRequest, VoterDescription, VoteRequest
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.voters import VoterOptions

VOTER = VoterDescription(
    digest="sha256:a",
    engine="engine:1",
    batch_sizes=(64,),
    workers=1,
    votes_per_s=10_000.0,
    start_s=5.0,
)
MODEL = VoterModel("sha256:a", "exact", VoterOptions(), "bundled:cifar10")
PLAN, X = Plan(n0=100, n=1000, alpha=0.001), np.zeros((2, 2, 3), np.int32)
Request = VoteRequest | DriveRequest
Behaviour = Callable[[Request], Coroutine[Any, Any, Any]]


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
        self.count = self.drive = self.describe = self  # `handle.count.remote(...)`, `handle.describe.remote()`

    def remote(self, request: Request | None = None) -> Response:
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


async def honest(request: Request) -> Any:
    if isinstance(request, VoteRequest):
        return [votes_of(task.draw) for task in request.tasks]
    run: Certification = pickle.loads(pickle.dumps(request.run))
    while isinstance(draw := run.wants(64), Draw):
        run.add(draw, votes_of(draw))
    return run


def mismatch() -> Exception:
    """The voter's own exception as awaiting a `DeploymentResponse` raises it."""
    return RayTaskError("count", "traceback", EngineMismatchError("other engine")).as_instanceof_cause()


def defect() -> Exception:
    return RayTaskError("count", "traceback", ZeroDivisionError("a defect")).as_instanceof_cause()


def certification() -> Certification:
    return Certification(PLAN, classes=3, sigma=0.25)


async def driven(handle: Handle, budget_s: float = 60.0) -> Certification:
    voter = RemoteVoter(handle, 2, "sha256:a")
    described = await voter.describe()
    with voter.admitted(PLAN, 1000, budget_s) as job:
        return await voter.drive(job, certification(), X, b"s" * 16, described)


def drive(count: Behaviour, budget_s: float = 60.0) -> tuple[Certification, Handle]:
    handle = Handle(count)
    return asyncio.run(driven(handle, budget_s)), handle


@pytest.fixture(params=[True, False], ids=["lent", "calls"])
def lent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a voter drives the run, which is alone, or is asked for its votes call by call."""
    if not request.param:
        monkeypatch.setattr("macer_serve.serving.schedule._DRIVE_AMONG_OTHERS_S", 0.0)  # no run is so short
    return bool(request.param)


@pytest.fixture(autouse=True)
def short_pauses_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("macer_serve.serving.repeated_calls._PAUSE_S", 0.01)
    monkeypatch.setattr("macer_serve.serving.schedule._CALL_S", 0.0)  # calls of one pass


@pytest.mark.parametrize(
    "failure",
    [
        lambda: ActorDiedError(),
        lambda: ActorUnavailableError("unavailable", None),
        lambda: NodeDiedError("node"),
        lambda: DeploymentUnavailableError(DeploymentID("voter", "macer")),
        lambda: asyncio.CancelledError(),  # how a replica that is being stopped answers
        lambda: AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata()),  # by gRPC
        mismatch,
        lambda: EngineMismatchError("as gRPC brings it"),
    ],
)
def test_what_is_lost_is_asked_for_again_and_no_vote_changes(failure: Callable[[], BaseException], lent: bool) -> None:
    undisturbed, _ = drive(honest)
    failures = iter([True, True, False, True, False, True])

    async def flaky(request: Request) -> Any:
        if next(failures, False):
            raise failure()
        return await honest(request)

    disturbed, handle = drive(flaky)
    assert disturbed.claim() == undisturbed.claim()
    assert disturbed.claim().class_id == 1
    # A description; the run and twice that it is lost; or 1,100 votes in passes of 64, of which four are lost.
    assert len(handle.responses) == (1 + 1 + 2 if lent else 1 + 18 + 4)


def test_a_run_is_given_up_if_only_voters_of_another_engine_answer(lent: bool) -> None:
    async def other(request: Request) -> Any:
        raise mismatch()

    with pytest.raises(UnavailableError, match="no voter of the engine"):
        drive(other)


def test_a_request_waits_for_a_lost_voter_until_its_deadline_and_is_told_when_to_come_back(lent: bool) -> None:
    async def lost(request: Request) -> Any:
        raise ActorDiedError

    with pytest.raises(UnavailableError, match="no voter has counted in time") as caught:
        drive(lost, budget_s=0.5)
    assert 1 <= caught.value.retry_after_s <= VOTER.start_s


def test_a_request_outlives_the_restart_of_the_only_voter(lent: bool) -> None:
    gone = asyncio.Event()

    async def restarting(request: Request) -> Any:
        if not gone.is_set():
            asyncio.get_running_loop().call_later(1.5, gone.set)
            await gone.wait()
            raise ActorDiedError
        return await honest(request)

    run, _ = drive(restarting)
    assert run.claim() == drive(honest)[0].claim()


def test_a_hung_replica_delays_a_run_by_less_than_two_seconds_and_gets_no_more_work(lent: bool) -> None:
    asked: list[Request] = []

    async def hangs_at_first(request: Request) -> Any:
        asked.append(request)
        if len(asked) == (1 if lent else 3):
            await asyncio.Event().wait()
        return await honest(request)

    async def timed() -> tuple[Certification, float, int]:
        handle = Handle(hangs_at_first)
        began = time.monotonic()
        run = await driven(handle)
        took = time.monotonic() - began
        # The hung call is left to its replica: Serve's router then sees that replica as busy.
        return run, took, sum(response.cancelled for response in handle.responses)

    run, took, cancelled = asyncio.run(timed())
    assert run.claim() == drive(honest)[0].claim()
    assert took < 2  # a bound of the guarantee, which waits for a second, and half a second for a run that is driven
    assert cancelled == 0


def test_calls_belong_to_no_request(lent: bool) -> None:
    """Serve cancels what was called in the context of a request when its client leaves, and calls serve many."""
    request_of = contextvars.ContextVar("request_of", default="none")
    seen = []

    async def watched(request: Request) -> Any:
        seen.append(request_of.get())
        return await honest(request)

    class Watching(Handle):
        def remote(self, request: Request | None = None) -> Response:
            if request is not None:
                seen.append(request_of.get())
            return super().remote(request)

    async def one() -> None:
        voter = RemoteVoter(Watching(watched), 2, "sha256:a")
        described = await voter.describe()
        request_of.set("this")
        with voter.admitted(PLAN, 1000, 60.0) as job:
            await voter.drive(job, certification(), X, b"s" * 16, described)

    asyncio.run(one())
    assert len(seen) > 1
    assert set(seen) == {"none"}


def test_overload_is_said_at_once() -> None:
    async def overloaded(request: Request) -> Any:
        raise BackPressureError(5, 5)

    with pytest.raises(UnavailableError, match="overloaded"):
        drive(overloaded)


def test_a_defect_of_the_voter_is_not_repeated(lent: bool) -> None:
    asked = []

    async def broken(request: Request) -> Any:
        asked.append(request)
        raise defect()

    with pytest.raises(ZeroDivisionError):
        drive(broken)
    assert len(asked) <= 4  # the window


def test_cancelling_a_run_cancels_whatever_is_in_flight(lent: bool) -> None:
    async def never(request: Request) -> Any:
        await asyncio.Event().wait()
        raise AssertionError

    async def cancelled_in_the_middle() -> Handle:
        handle = Handle(never)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await driven(handle)
        await asyncio.sleep(0.1)
        assert len(asyncio.all_tasks()) == 1  # nothing runs on
        return handle

    handle = asyncio.run(cancelled_in_the_middle())
    assert len(handle.responses) == (1 + 1 if lent else 1 + 4)
    assert all(response.cancelled for response in handle.responses[1:])


def test_a_voter_of_another_checkpoint_is_refused() -> None:
    replaced = replace(VOTER, digest="sha256:b", engine="engine:2")
    voter = RemoteVoter(Handle(honest, replaced), 1, "sha256:a")
    with pytest.raises(UnavailableError, match="replaced"):
        asyncio.run(voter.describe())


@pytest.mark.parametrize("failure", [ActorDiedError(), BackPressureError(5, 5)])
def test_a_voter_that_does_not_answer_is_unavailable(failure: Exception) -> None:
    with pytest.raises(UnavailableError):
        asyncio.run(RemoteVoter(Handle(honest, failure), 1, "sha256:a").ask(0.3))


def test_who_has_no_time_at_all_is_admitted_by_voters_that_count() -> None:
    async def alone() -> Certification:
        voter = RemoteVoter(Handle(honest), 1, "sha256:a")
        described = await voter.describe(5e-324)
        with voter.admitted(PLAN, 1000, 0.0) as job:
            return await voter.drive(job, certification(), X, b"s" * 16, described)

    run = asyncio.run(alone())
    assert run.done
    assert run.drawn < run.most


def test_who_cannot_be_answered_in_time_is_refused_at_once() -> None:
    async def slow(request: Request) -> Any:
        await asyncio.sleep(0.2)
        return await honest(request)

    async def crowd() -> list[BaseException | None]:
        voter = RemoteVoter(Handle(slow), 1, "sha256:a")
        described = await voter.describe()

        async def one() -> None:
            with voter.admitted(PLAN, 1000, 0.5) as job:
                await voter.drive(job, certification(), X, b"s" * 16, described)

        return await asyncio.gather(*(one() for _ in range(20)), return_exceptions=True)

    outcomes = asyncio.run(crowd())
    refused = [error for error in outcomes if isinstance(error, OverloadedError)]
    assert all(error is None or error in refused for error in outcomes)
    assert 15 <= len(refused) < 20  # 10,000 votes per second would serve four, and the first is always admitted


@pytest.mark.parametrize("error", [None, ActorDiedError()])
def test_a_value_does_not_wait_for_the_end_of_its_stream(error: Exception | None) -> None:
    """Yet the stream is read to its end, which frees it. A replica that is lost after the value costs nothing."""

    async def asked() -> None:
        may_end, ended = asyncio.Event(), asyncio.Event()

        async def stream(*_: object) -> AsyncIterator[str]:
            yield "votes"
            await may_end.wait()
            ended.set()
            if error is not None:
                raise error

        method = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=stream))
        handle = ModelHandle(SimpleNamespace(describe=method, count=method, drive=method), MODEL)
        assert await handle.count.remote("request") == "votes"
        assert not ended.is_set()
        may_end.set()
        await asyncio.wait_for(ended.wait(), 5)

    asyncio.run(asked())
