"""The cluster's voters as the ingress sees them: it admits requests by time, and sends passes of votes to replicas."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from macer_serve.errors import EngineMismatchError
from macer_serve.serving.admission import Expectations, Expected, Rate
from macer_serve.serving.jobs import Call, Job
from macer_serve.serving.problems import OverloadedError, UnavailableError
from macer_serve.serving.schedule import Schedule
from macer_serve.serving.voter_replica import VoterDescription, VoteRequest
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.noise import FixedPoint
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import Task

log = logging.getLogger("ray.serve")

_CALLS = 3  # in flight for the same result, at most
_OVERTAKEN = 8  # times that a call is given more time because others go before it
_DESCRIBED_S = 0.25  # a replica that has not described itself after this time is late
_PAUSE_S = 1.0  # between repetitions of a failed call, at most
_OTHER_ENGINES = 6  # refusals by replicas of another engine after which a run is given up
_OTHER_ENGINE = "no voter of the engine that began this certificate is left; try again"


class RemoteVoter:
    """All replicas of one voter deployment, which must hold checkpoint `digest`.

    The calls of all requests are ordered by a `Schedule`, which keeps few in flight: a replica has its next passes at
    hand, and the order of all further ones is still open. `passes` counts those that were sent since the start, `votes`
    the noisy copies in them. `replaced` says that a replica holds another checkpoint, which only a restart of the
    server can mend.
    """

    def __init__(self, handle: Any, replicas: int, digest: str) -> None:
        self._handle, self._replicas, self._digest = handle, replicas, digest
        self._voter: VoterDescription | None = None
        self._stale = False  # whether replicas must be asked again
        self._schedule = Schedule((1,), 1, replicas)
        self._rate = Rate(1.0, 1.0, 1)
        self._expected = Expectations()
        self._restart_s = 0.0  # from the loss of the last voter to the first votes after it
        self._lost_at: float | None = None  # when a replica was lost, if nothing was counted since
        self._in_flight: dict[asyncio.Task[None], tuple[Call, Rate]] = {}
        self.passes = self.votes = 0
        self.replaced = False
        self._late: set[asyncio.Task[Any]] = set()  # calls that nobody waits for any more

    # --- what a replica says of itself --------------------------------------------------------------------------------

    async def describe(self, timeout_s: float = 10.0) -> VoterDescription:
        """Returns what a replica has said of itself. Asks, and raises, as `ask` does if none has said anything."""
        return await self.ask(timeout_s) if self._voter is None or self._stale else self._voter

    async def ask(self, timeout_s: float) -> VoterDescription:
        """Returns what a replica says of itself now. A late replica is not waited for if another one answers.

        Raises `UnavailableError` if none answers in time, or if the replica has loaded another checkpoint than the
        ingress: certificates would name the wrong one.
        """
        try:
            async with asyncio.timeout(timeout_s):
                voter: VoterDescription = await self._first(self._handle.describe.remote, _DESCRIBED_S)
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
        if missing >= budget_s:
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
        progress: Callable[[Certification], None] = lambda run: None,
    ) -> None:
        """Run the certification of `x` under `seed` to its end, or until the job's deadline; `progress` sees each step.

        Every vote is by the engine described. Cancelling this coroutine and leaving the job give up what is in flight.
        Raises `UnavailableError` if no replica of that engine is left, or if no voter has counted in time.
        """
        if self._voter is None or voter.engine != self._voter.engine:
            raise UnavailableError(_OTHER_ENGINE)
        counted = asyncio.Event()
        job.begin(run, x, seed, counted.set)
        self._send()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + job.deadline - time.monotonic()):
                while not run.done:
                    await counted.wait()
                    counted.clear()
                    if job.error is not None:
                        raise job.error
                    progress(run)
        except TimeoutError:
            if not run.drawn and (self._lost_at is not None or self._rate.stalled_s(time.monotonic())):
                raise UnavailableError(
                    "no voter has counted in time; try again later", self._until_restarted()
                ) from None
            run.stop("deadline")
            if run.drawn < job.expected.mean:
                return  # it would have used more, and nobody knows how much
        self._expected.learn(run.plan, run.most - run.plan.selection, run.drawn)

    def _send(self) -> None:
        """Sends calls until enough are in flight, or nothing more is of use."""
        while (call := self._schedule.next_call(self._rate.speed)) is not None:
            now, rate = time.monotonic(), self._rate
            rate.sent(call.passes, now)
            self.passes, self.votes = self.passes + call.passes, self.votes + len(call)
            sent = asyncio.create_task(self._vote(call, rate, now))
            self._in_flight[sent] = call, rate
            sent.add_done_callback(self._ended)

    def _ended(self, sent: asyncio.Task[None]) -> None:
        call, rate = self._in_flight.pop(sent)
        try:
            if sent.cancelled():
                rate.dropped(call.passes, time.monotonic())
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

    async def _vote(self, call: Call, rate: Rate, sent_at: float) -> None:
        """Has the votes of a call counted, or its error noted. `rate` is that of the engine which the call asks."""
        assert self._voter is not None  # its batch sizes made the call
        tasks = tuple(Task(job.x, job.seed, draw) for job, draw in call.pieces if job.x is not None)
        engine = self._voter.engine

        def count() -> Any:
            return self._handle.count.remote(VoteRequest(tasks, engine, call.turn - time.monotonic(), call.small))

        try:
            votes = await self._first(count, rate.patience_s, lambda: self._schedule.overtaken(call))
        except Exception as error:
            if isinstance(error, UnavailableError):
                self._stale = True  # replicas may be those of another engine now
            rate.dropped(call.passes, time.monotonic())
            self._schedule.fail(call, error)
            return
        now = time.monotonic()
        if self._lost_at is not None and rate.stalled_s(now):
            self._restart_s = now - self._lost_at
        self._lost_at = None
        rate.counted(call.passes, len(call), now - sent_at, now)
        self._schedule.count(call, votes)

    async def _first(
        self, call: Callable[[], Any], patience_s: float, overtaken: Callable[[], bool] = lambda: False
    ) -> Any:
        """Returns the first result of a call to a replica. The call is sent to a further replica each time it is late.

        A call that is overtaken is not late so soon: the replica makes one pass in eight of the oldest call.
        Votes are the same by whichever replica. The late call is left to its replica, so that Serve's router, which
        sends to the replica with fewer calls, sends it nothing more.
        """
        calls = [asyncio.create_task(self._repeated(call))]
        late: list[asyncio.Task[Any]] = []
        waits = _OVERTAKEN
        try:
            while True:
                done, _ = await asyncio.wait(calls, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    return done.pop().result()
                if waits and overtaken():
                    waits -= 1
                    continue
                late = list(calls)
                if len(calls) < _CALLS:
                    log.warning("a voter is late: another one is asked")
                    calls.append(asyncio.create_task(self._repeated(call)))
        finally:
            for left in calls:
                if left in late:
                    self._late.add(left)
                    left.add_done_callback(self._forget)
                else:
                    left.cancel()
            await asyncio.gather(*(left for left in calls if left not in late), return_exceptions=True)

    def _forget(self, late: asyncio.Task[Any]) -> None:
        self._late.discard(late)
        if not late.cancelled():
            late.exception()  # nobody waits for it

    async def _repeated(self, call: Callable[[], Any]) -> Any:
        """Returns the result of a call. If its replica is lost, the call is repeated and gives the same result."""
        others = 0
        for attempt in itertools.count():
            response = call()
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                why = "the replica was stopped"  # Ray reports that, too, as a cancellation
            except BackPressureError as error:
                raise UnavailableError("the voters are overloaded; try again shortly") from error
            except (RayError, DeploymentUnavailableError) as error:
                # What the voter itself raised arrives as a RayTaskError that is also of the original's class.
                if isinstance(error, EngineMismatchError):
                    others += 1
                    if others == _OTHER_ENGINES:
                        raise UnavailableError(_OTHER_ENGINE) from error
                elif isinstance(error, RayTaskError):
                    raise
                why = type(error).__name__
            if asyncio.current_task() in self._late:
                return None
            self._lost_at = self._lost_at or time.monotonic()
            log.warning("a voter is asked again: %s", why)
            await asyncio.sleep(min(_PAUSE_S, 0.05 * 2**attempt))
        raise AssertionError("unreachable")
