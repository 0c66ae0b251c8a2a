"""The cluster's voters as the ingress sees them: it admits requests by time, and sends passes of votes to replicas."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from macer_serve.serving.admission import Expectations, Expected, Rate
from macer_serve.serving.jobs import Call, Count, Drive, Job
from macer_serve.serving.problems import OverloadedError, UnavailableError
from macer_serve.serving.repeated_calls import RepeatedCalls
from macer_serve.serving.schedule import Schedule
from macer_serve.serving.voter_replica import DriveRequest, VoterDescription, VoteRequest
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.noise import FixedPoint
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import Task

log = logging.getLogger("ray.serve")

_DESCRIBED_S = 0.25  # a replica that has not described itself after this time is late
_LEAST_ASKED_S = 1.0
_BACK_S = 0.05  # a driven run comes back so long before the deadline of its request
_LEAST_S = 0.01  # that a voter is given to drive a run, however late it is
_OTHER_ENGINE = "no voter of the engine that began this certificate is left; try again"


class RemoteVoter:
    """All replicas of one voter deployment, which must hold checkpoint `digest`.

    The calls of all requests are ordered by a `Schedule`, which keeps few in flight: a replica has its next passes at
    hand, and the order of all further ones is still open. `calls` counts those that were sent since the start, `votes`
    the noisy copies that they asked for. `replaced` says that a replica holds another checkpoint, which only a restart
    of the server can mend.
    """

    def __init__(self, handle: Any, replicas: int, digest: str) -> None:
        self._handle, self._replicas, self._digest = handle, replicas, digest
        self._voter: VoterDescription | None = None
        self._stale = False  # whether replicas must be asked again
        self._schedule = Schedule((1,), 1, replicas)
        self._rate = Rate(1.0, 1.0, 1)
        self._expected = Expectations()
        self._restart_s = 0.0  # from the loss of the last voter to the first votes after it
        self._calls = RepeatedCalls(_OTHER_ENGINE)
        # Serve cancels the calls that were made in the context of a request when its client leaves. Calls are made for
        # many requests, hence in a context of none.
        self._context = contextvars.copy_context()
        self._in_flight: dict[asyncio.Task[None], tuple[Call, Rate]] = {}
        self.calls = self.votes = 0
        self.replaced = False

    # --- what a replica says of itself --------------------------------------------------------------------------------

    async def describe(self, timeout_s: float = 10.0) -> VoterDescription:
        """Returns what a replica has said of itself. Asks, and raises, as `ask` does if none has said anything.

        Waits a second at least: a shorter deadline of a client is no fault of the voters.
        """
        return await self.ask(max(timeout_s, _LEAST_ASKED_S)) if self._voter is None or self._stale else self._voter

    async def ask(self, timeout_s: float) -> VoterDescription:
        """Returns what a replica says of itself now. A late replica is not waited for if another one answers.

        Raises `UnavailableError` if none answers in time, or if the replica has loaded another checkpoint than the
        ingress: certificates would name the wrong one.
        """
        try:
            async with asyncio.timeout(timeout_s):
                voter: VoterDescription = await self._calls.first(self._handle.describe.remote, _DESCRIBED_S)
        except TimeoutError as error:
            raise UnavailableError("no voter answers; try again shortly", self._until_restarted()) from error
        self.replaced = voter.digest != self._digest
        if self.replaced:
            log.error("the voter holds checkpoint %s, the ingress %s: restart the server", voter.digest, self._digest)
            raise UnavailableError("the checkpoint was replaced while it was served; the server must be restarted")
        if self._voter is None or voter.engine != self._voter.engine:
            self._use(voter)
        self._stale = False
        return voter

    def _use(self, voter: VoterDescription) -> None:
        """Sends passes for this engine from now on. Runs that another engine began are given up."""
        workers = voter.workers * self._replicas
        per_second = voter.votes_per_s * self._replicas
        for job in list(self._schedule.jobs):
            if job.run is not None:
                self._schedule.give_up(job, UnavailableError(_OTHER_ENGINE))
        self._schedule.batch_sizes, self._schedule.workers = voter.batch_sizes, workers
        self._rate = Rate(per_second, 2 * voter.batch_sizes[-1] * workers / per_second, workers)
        self._restart_s = voter.start_s
        self._voter = voter

    # --- admission ----------------------------------------------------------------------------------------------------

    @contextmanager
    def admitted(self, plan: Plan, cap: int, budget_s: float) -> Iterator[Job]:
        """Holds a place among the requests in work, for a certification that has `budget_s` seconds for its votes.

        Raises `OverloadedError` if the requests in work leave no time for it, and `UnavailableError` if no voter counts
        and none can be expected to count in time. Both say after how many seconds there will be time.
        """
        expected = self.require_time(plan, cap, budget_s)
        job = self._schedule.admit(expected, budget_s, time.monotonic(), self._rate.speed)
        try:
            yield job
        finally:
            self._schedule.leave(job)
            self._give_up_useless()

    def require_time(self, plan: Plan, cap: int, budget_s: float) -> Expected:
        """Returns the votes that the certification is expected to use. Raises as `admitted` does."""
        now, jobs = time.monotonic(), len(self._schedule.jobs)
        expected = self._expected.votes(plan, cap)
        stalled = self._rate.stalled_s(now)
        missing = self._until_restarted() if stalled else 0.0
        if stalled and missing >= budget_s:
            raise UnavailableError(f"no voter has counted for {stalled:.0f} s; try again later", missing)
        # A request that finds nobody else in work is admitted: it gets what can be proved within its time.
        wait = self._schedule.wait_for(expected, budget_s - missing, now, self._rate.speed) if jobs else 0.0
        if wait > 0:
            raise OverloadedError(
                f"{jobs} requests are in work, and this one could not be answered within {budget_s:g} s; "
                "try again later",
                missing + wait,
            )
        return expected

    def _until_restarted(self) -> float:
        """Returns the seconds until a voter can be expected to count again.

        A restart that takes longer than the last one is expected to take half as long again.
        """
        stalled = self._rate.stalled_s(time.monotonic())
        return max(1.0, self._restart_s - stalled, 0.5 * stalled if stalled > self._restart_s else 0.0)

    # --- votes --------------------------------------------------------------------------------------------------------

    async def drive(
        self,
        job: Job,
        run: Certification,
        x: FixedPoint,
        seed: bytes,
        voter: VoterDescription,
        progress: Callable[[Certification], None] | None = None,
    ) -> Certification:
        """Returns the certification of `x` under `seed` at its end, or at the job's deadline; `progress` sees it grow.

        Every vote is by the engine described. Cancelling this coroutine and leaving the job give up what is in flight.
        Raises `UnavailableError` if no replica of that engine is left, or if no voter has counted in time.
        """
        if self._voter is None or voter.engine != self._voter.engine:
            raise UnavailableError(_OTHER_ENGINE)
        counted = asyncio.Event()
        job.begin(run, x, seed, counted.set, watched=progress is not None)
        self._send()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + job.deadline - time.monotonic()):
                while not run.done:
                    await counted.wait()
                    counted.clear()
                    if job.error is not None:
                        raise job.error
                    run = job.run or run
                    if progress is not None:
                        progress(run)
        except TimeoutError:
            run = job.run or run
            if not run.drawn and (self._calls.lost_at is not None or self._rate.stalled_s(time.monotonic())):
                raise UnavailableError(
                    "no voter has counted in time; try again later", self._until_restarted()
                ) from None
            run.stop("deadline")
            if run.drawn < job.expected.mean:
                return run  # it would have used more, and nobody knows how much
        self._expected.learn(run.plan, run.most - run.plan.selection, run.drawn)
        return run

    def end_by(self, end: float) -> None:
        """Has the runs in work come back by `end`, of `time.monotonic`, with what is counted."""
        for job in self._schedule.jobs:
            job.deadline = min(job.deadline, end)

    def _send(self) -> None:
        """Sends calls until enough are in flight, or nothing more is of use."""
        while (call := self._schedule.next_call(self._rate.speed)) is not None:
            now, rate = time.monotonic(), self._rate
            self.calls += 1
            if isinstance(call, Drive):
                rate.lent(call, call.passes, now + call.for_s, now)
                work = self._lend(call, rate)
            else:
                rate.sent(call.passes, now)
                self.votes += len(call)
                work = self._vote(call, rate, now)
            sent = asyncio.create_task(work, context=self._context.copy())
            self._in_flight[sent] = call, rate
            sent.add_done_callback(self._ended, context=self._context.copy())

    def _ended(self, sent: asyncio.Task[None]) -> None:
        call, rate = self._in_flight.pop(sent)
        try:
            if sent.cancelled():
                self._lost(call, rate, None)
                self._schedule.drop(call)
            else:
                sent.result()  # a defect is raised where the event loop reports it
        finally:
            self._give_up_useless()
            self._send()

    def _give_up_useless(self) -> None:
        """Cancels the calls that no request waits for."""
        for sent, (call, _) in self._in_flight.items():
            if not call.of_use:
                sent.cancel()

    async def _vote(self, call: Count, rate: Rate, sent_at: float) -> None:
        """Has the votes of a call counted, or its error noted. `rate` is that of the engine which the call asks."""
        assert self._voter is not None  # its batch sizes made the call
        tasks = tuple(Task(job.x, job.seed, draw) for job, draw in call.pieces if job.x is not None)
        engine = self._voter.engine

        def count() -> Any:
            return self._handle.count.remote(VoteRequest(tasks, engine, call.turn - time.monotonic(), call.small))

        if (votes := await self._answer(call, count, rate)) is not None:
            now = time.monotonic()
            rate.counted(call.passes, len(call), now - sent_at, now)
            self._schedule.count(call, votes)

    async def _lend(self, call: Drive, rate: Rate) -> None:
        """Has a voter drive a run, or its error noted."""
        job, run, x = call.job, call.job.run, call.job.x
        assert self._voter is not None  # it was to be alone on it
        assert run is not None
        assert x is not None
        engine = self._voter.engine

        def drive() -> Any:
            now = time.monotonic()
            left_s = job.deadline - now
            # A run that comes back too late has lost the votes of its last drive, which is hence short.
            for_s, stop_s = min(call.for_s, max(_BACK_S, 0.5 * left_s)), max(_LEAST_S, left_s - _BACK_S)
            request = DriveRequest(run, x, job.seed, engine, call.turn - now, call.small, for_s, stop_s)
            return self._handle.drive.remote(request)

        if (back := await self._answer(call, drive, rate, call.for_s)) is not None:
            rate.given_back(call, back.drawn - run.drawn, time.monotonic())
            self.votes += back.handed_out - run.handed_out
            self._schedule.go_on(call, back)

    async def _answer(self, call: Call, ask: Callable[[], Any], rate: Rate, lasts_s: float = 0.0) -> Any:
        """Returns what a voter answers to a call. If it is an error, that is noted, and None is returned."""
        try:
            answer = await self._calls.first(ask, rate.patience_s, lambda: self._schedule.overtaken(call), lasts_s)
        except Exception as error:
            if isinstance(error, UnavailableError):
                self._stale = True  # replicas may be those of another engine now
            self._lost(call, rate, 0)
            self._schedule.fail(call, error)
            return None
        lost_at, self._calls.lost_at = self._calls.lost_at, None
        if lost_at is not None and rate.stalled_s(now := time.monotonic()):
            self._restart_s = now - lost_at
        return answer

    @staticmethod
    def _lost(call: Call, rate: Rate, votes: int | None) -> None:
        """Takes note that a call has ended without an answer; `votes` as in `Rate.given_back`."""
        if isinstance(call, Drive):
            rate.given_back(call, votes, time.monotonic())
        else:
            rate.dropped(call.passes, time.monotonic())
