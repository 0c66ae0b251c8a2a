"""Which copies the next call to a voter asks for, among all requests in work. Without I/O and without a clock.

schedule = Schedule(batch_sizes=(64, 256), workers=2, replicas=1)
job = schedule.admit(expected, budget=60.0, now=0.0, speed=speed)   # now in seconds of any clock
job.begin(run, x, seed)
call = schedule.next_call(speed)                     # None if enough is in flight, or no run can use more votes
schedule.count(call, votes)                          # the votes of each piece; the jobs' runs move on
schedule.go_on(call, run)                            # or, if the call is a `Drive`, the run that has come back
schedule.leave(job)

Each request has a turn: its arrival plus ten times the time that it would take alone, or its deadline if that is
earlier. Requests go in the order of their turns, and so do their passes at the voter: short requests overtake long ones
at every pass. Hence a call may hold several passes of a long request, which saves most of what calls cost. Copies far
beyond a run's next look may turn out to be of no use. They only fill passes for which nothing else is needed.

A request that is short and before all others shares no passes. Its run goes to a voter, which looks at the votes of
each pass and makes the next: that saves the time of a call between two looks. Long runs gain little by it, and workers
would wait for each other whenever a run comes back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from macer_serve.serving.admission import Expected, Speed
from macer_serve.serving.jobs import Call, Count, Drive, Job
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.smoothing.window import EARLY_PASSES
from macer_serve.voters.packing import SMALL_PASSES, passes_of

C = TypeVar("C", bound=Call)

# A large pass is worth its time if so much of it is filled. Otherwise a small one is sent.
_WORTH_A_LARGE_PASS = 0.75
# The share of the voters' rate that admitted work may claim. The rest covers changes of the rate.
_ADMITTED = 0.9
# Admitted work is expected to be done in time even if it takes so many standard deviations more than expected.
_DEVIATIONS = 1.5
# A request's turn comes after so many times the time that it would take alone.
_SLOWDOWN = 10.0
# A call holds at most the passes that a replica makes in so many seconds.
_CALL_S = 0.2
# A job that was overtaken asks for small passes, until the voters have counted for so many seconds.
_YIELDING_S = 1.0
# A replica has so many calls at hand, or one pass more than it has workers.
_CALLS = 2
# A voter drives a run that takes so many seconds, and gives it back then. It is less if another voter could take over
# when this one hangs, and if somebody watches the run.
_DRIVE_S = 1.0
_DRIVE_AMONG_OTHERS_S = 0.5
_DRIVE_WATCHED_S = 0.3


@dataclass(slots=True)
class Schedule:
    """The jobs of one model. `batch_sizes` are those of its voters, ascending.

    `workers` passes run at a time on all `replicas` of the voter together.
    """

    batch_sizes: tuple[int, ...]
    workers: int
    replicas: int
    jobs: dict[Job, None] = field(default_factory=dict)
    _in_flight: dict[Call, None] = field(default_factory=dict)
    _again: deque[Count] = field(default_factory=deque)

    def admit(self, expected: Expected, budget: float, now: float, speed: Speed) -> Job:
        """Returns a new job, which has no run yet and is to be finished in `budget` seconds."""
        in_time = self.wait_for(expected, budget, now, speed) <= 0
        job = Job(expected, now + budget, _turn(expected, budget, now, speed), in_time)
        for other in self.jobs:
            if other.turn > job.turn:
                other.overtaken = other.attained
        self.jobs[job] = None
        return job

    def leave(self, job: Job) -> None:
        """Forgets the job. Votes for it that arrive later are dropped."""
        job.left = True
        self.jobs.pop(job, None)

    @property
    def backlog(self) -> float:
        """The number of votes that all jobs together are expected to need still."""
        return sum(job.remaining for job in self.jobs)

    def wait_for(self, expected: Expected, budget: float, now: float, speed: Speed) -> float:
        """Returns after how many seconds another job with `budget` seconds can be admitted; 0 means now.

        A job can be admitted if all jobs, in the order of their turns, can be finished by their deadlines. A job that
        cannot be finished in any case does not count.
        """
        usable, turn = _ADMITTED * speed.votes_per_s, _turn(expected, budget, now, speed)
        mean, variance, limit = expected.mean, (expected.deviation or 0.0) ** 2, expected.most
        before = min(limit, _most(mean, variance))  # of this job and those whose turns come before its own
        wait = 0.0
        for job in sorted(self.jobs, key=lambda job: job.turn):
            mean, variance, limit = mean + job.remaining, variance + job.variance, limit + job.limit
            most = min(limit, _most(mean, variance))
            if job.turn <= turn:
                before = most
            # After this job's turn has come, the new one is not before it.
            elif job.in_time and most > usable * (job.deadline - speed.call_s - now):
                wait = max(wait, job.turn - turn)
        return max(wait, before / usable - (budget - speed.call_s))

    def next_call(self, speed: Speed) -> Count | Drive | None:
        """Returns the next call to send to a voter; None if nothing is of use, or what goes before it is enough."""
        if (drive := self._to_be_driven(speed)) is not None:
            return self._sent(drive)
        while self._again:
            if (again := self._again.popleft()).of_use:
                return self._sent(again)
        lent = self._lent
        ready = sorted((job for job in self.jobs if job.wants_copies and job not in lent), key=lambda job: job.turn)
        if not ready:
            return None
        needs = {job: self._needs(job, len(ready)) for job in ready}
        first = next((job for job in ready if needs[job]), ready[-1])
        if self._enough_before(first.turn):
            return None
        sizes = self.batch_sizes[:1] if self._yields(first, speed) else self.batch_sizes
        passes = passes_of(self._size(needs, first, speed), sizes)
        pieces = self._needed(needs, sum(passes))
        pieces += self._ahead(reversed(ready), sum(passes) - sum(len(draw) for _, draw in pieces))
        return self._sent(self._call(pieces, sizes)) if pieces else None

    def count(self, call: Count, votes: Sequence[Votes]) -> None:
        """Counts the votes of each piece of a call. Pieces of jobs that need none any more are dropped."""
        self.drop(call)
        for (job, draw), counts in zip(call.pieces, votes, strict=True):
            if job.wants_copies:
                assert job.run is not None  # it wants copies
                job.run.add(draw, counts)
        for job in call.jobs:
            job.wake()

    def go_on(self, call: Drive, run: Certification) -> None:
        """Takes back a run, as far as a voter has driven it."""
        self.drop(call)
        if call.job.wants_copies:
            call.job.run = run
        call.job.wake()

    def give_up(self, job: Job, error: Exception) -> None:
        """Ends the job by an error."""
        job.error = error
        job.wake()

    def fail(self, call: Call, error: Exception) -> None:
        """Gives the error to the job that caused it. The jobs of a shared call are each tried alone first."""
        self.drop(call)
        if len(jobs := call.jobs) == 1:
            self.give_up(jobs[0], error)
        else:
            assert isinstance(call, Count)  # a run is one job's
            sizes = self.batch_sizes[:1] if call.small else self.batch_sizes
            alone = ([piece for piece in call.pieces if piece[0] is job] for job in jobs)
            self._again.extend(self._call(pieces, sizes) for pieces in alone)

    def drop(self, call: Call) -> None:
        """Forgets a call that has ended."""
        del self._in_flight[call]

    @staticmethod
    def _call(pieces: list[tuple[Job, Draw]], sizes: Sequence[int]) -> Count:
        """Returns the call for pieces that are voted on in passes of these sizes."""
        passes = passes_of(sum(len(draw) for _, draw in pieces), sizes)
        return Count(pieces=tuple(pieces), passes=len(passes), small=len(sizes) == 1)

    def overtaken(self, call: Call) -> bool:
        """Returns whether a call in flight goes before this one, so that it may have to wait."""
        return any(other.turn < call.turn for other in self._in_flight)

    def _sent(self, call: C) -> C:
        self._in_flight[call] = None
        return call

    def _to_be_driven(self, speed: Speed) -> Drive | None:
        """Returns the run that a voter is to drive: that of the first job, if it is short and awaits no votes."""
        waiting = [job for job in self.jobs if job.wants_copies]
        job = min(waiting, key=lambda job: job.turn, default=None)
        if job is None or job.awaits_votes or job in self._lent or not job.is_light:
            return None
        for_s = _DRIVE_S if self.replicas == 1 else _DRIVE_AMONG_OTHERS_S
        if job.remaining > for_s * speed.votes_per_s / self.replicas:
            return None
        small = self._yields(job, speed)
        for_s = min(for_s, _DRIVE_WATCHED_S) if job.watched else for_s
        return Drive(job=job, passes=self.workers // self.replicas, small=small, for_s=for_s)

    @property
    def _lent(self) -> set[Job]:
        """The jobs whose runs voters drive."""
        return {call.job for call in self._in_flight if isinstance(call, Drive)}

    def _enough_before(self, turn: float) -> bool:
        """Returns whether the calls in flight that go before a job of this turn keep the voters at work."""
        # A voter that drives a run has one pass more at hand.
        passes = [call.passes + isinstance(call, Drive) for call in self._in_flight if call.turn <= turn]
        return len(passes) >= _CALLS * self.replicas and sum(passes) >= self.workers + self.replicas

    def _needs(self, job: Job, ready: int) -> int:
        """Returns how many copies of the job are worth a place in a pass for which `ready` jobs compete.

        The fewer compete, the further a run goes beyond its next look: it would spend its time on round trips.
        """
        assert job.run is not None  # it wants copies
        seen, small = job.run.seen, self.batch_sizes[0]
        window = (self.workers + 1) * small // max(1, ready - 1)
        ahead = max(small, window, seen // ready, int(job.expected.sure) - job.run.plan.selection - seen)
        return job.run.due(ahead)

    def _size(self, needs: dict[Job, int], first: Job, speed: Speed) -> int:
        """Returns how many copies the next call has room for, if `first` is the first job that needs some.

        It is what that job needs, so that it does not wait for the votes of others; but one pass of each worker, if
        these votes may decide, because they are counted when all of them are there. If it needs less than a small
        pass, a pass is shared: a large one, if it will be filled or a run is past its start.
        """
        small, large = self.batch_sizes[0], self.batch_sizes[-1]
        if needs[first] > small:
            in_time = speed.votes_per_s / self.replicas * _CALL_S
            one_each = large * self.workers / self.replicas
            most = large * max(1, int(min(in_time, max(one_each, first.certain / self.replicas))) // large)
            return min(most, needs[first])
        filled = len(needs) > 1 and sum(needs.values()) >= _WORTH_A_LARGE_PASS * large
        return large if filled or not all(map(self._early, needs)) else small

    def _yields(self, job: Job, speed: Speed) -> bool:
        """Returns whether the job was overtaken lately, so that others would wait for its large passes.

        Not on a GPU: small passes cost much more there, and large ones take milliseconds.
        """
        cheap = self.batch_sizes[-1] <= SMALL_PASSES * self.batch_sizes[0]
        return cheap and job.overtaken is not None and job.attained - job.overtaken < _YIELDING_S * speed.votes_per_s

    def _early(self, job: Job) -> bool:
        return job.attained < EARLY_PASSES * self.batch_sizes[-1]

    @staticmethod
    def _needed(needs: dict[Job, int], room: int) -> list[tuple[Job, Draw]]:
        """Returns up to `room` of the copies that the jobs need, in the order of the jobs."""
        pieces: list[tuple[Job, Draw]] = []
        for job, need in needs.items():
            assert job.run is not None
            while room and need and isinstance(draw := job.run.wants(min(room, need)), Draw):
                pieces.append((job, draw))
                room -= len(draw)
                need -= len(draw)
        return pieces

    def _ahead(self, jobs: Iterable[Job], room: int) -> list[tuple[Job, Draw]]:
        """Returns up to `room` copies beyond the next looks of the jobs, in the order of the jobs.

        A job has few passes in flight at its start, so that an early decision wastes little.
        """
        pieces: list[tuple[Job, Draw]] = []
        for job in jobs:
            in_flight = sum(call.passes for call in self._in_flight if job in call.jobs)
            if in_flight >= (self.workers + 1 if self._early(job) else 2 * self.workers):
                continue
            assert job.run is not None
            while room and isinstance(draw := job.run.wants(room), Draw):
                pieces.append((job, draw))
                room -= len(draw)
        return pieces


def _turn(expected: Expected, budget: float, now: float, speed: Speed) -> float:
    """Returns when the turn of a job comes that arrives now."""
    return now + min(budget, _SLOWDOWN * expected.mean / speed.votes_per_s)


def _most(mean: float, variance: float) -> float:
    """Returns the number of votes that work of this mean and variance hardly exceeds."""
    return mean + _DEVIATIONS * math.sqrt(variance)
