"""Which copies are voted on next, and who is admitted: on a clock and voters that are computed, not waited for."""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from macer_serve.serving.admission import Expectations, Expected, Rate, Speed
from macer_serve.serving.jobs import Count, Drive, Job
from macer_serve.serving.schedule import Schedule
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.smoothing.window import Window
from macer_serve.voters import Task
from macer_serve.voters.calls import Call as VoterCall
from macer_serve.voters.calls import Calls, hard_votes
from macer_serve.voters.packing import Batch, packed

RATE = 5_000.0  # votes per second of the computed voter, all workers together
SPEED = Speed(RATE, 0.1)
BATCH_SIZES = (64, 256)
SHORT = (Plan(n=100_000, tolerance=0.05), 500)  # plan and cap
LONG = (Plan(n=100_000, tolerance=0.0001), 100_000)
X = np.zeros((2, 2, 3), np.int32)


def logits_of(draw: Draw, seed: bytes = bytes([10])) -> npt.NDArray[np.float32]:
    """One copy in `seed[0]` is voted class 0, the others class 1: a function of the task, as a voter's votes are."""
    logits = np.zeros((len(draw), 3), np.float32)
    logits[np.arange(draw.start, draw.stop) % seed[0] != 0, 1] = 1
    return logits


def votes_of(draw: Draw) -> Votes:
    return hard_votes(logits_of(draw))


@dataclass
class Simulation:
    """A schedule with a voter on a clock of its own. A pass of b copies, padded, takes b / RATE seconds of all workers.

    `finished` holds, for each admitted request, its arrival, its deadline, the time of its answer and its votes.
    """

    workers: int = 2
    now: float = 0.0
    events: list[tuple[float, int, str, object]] = field(default_factory=list)
    finished: list[tuple[float, float, float, int]] = field(default_factory=list)
    refused: list[tuple[float, float]] = field(default_factory=list)  # when, and the seconds until there is time
    voted: int = 0
    computed: int = 0

    def __post_init__(self) -> None:
        self.schedule = Schedule(BATCH_SIZES, self.workers, 1)
        self.calls = Calls()
        self.sent: dict[VoterCall, tuple[Count, float] | Driver] = {}
        self.rate = Rate(RATE, 2 * BATCH_SIZES[-1] / RATE, self.workers)
        self.expected = Expectations()
        self.busy = 0
        self.number = itertools.count()

    def at(self, when: float, what: str, of: object) -> None:
        heapq.heappush(self.events, (when, next(self.number), what, of))

    def arrive(self, when: float, plan: Plan, cap: int, budget: float, one_in: int = 10) -> None:
        self.at(when, "arrive", (plan, cap, budget, bytes([one_in])))

    def run(self) -> None:
        while self.events:
            self.now, _, what, of = heapq.heappop(self.events)
            if what == "arrive":
                self._admit(*of)  # type: ignore[misc]
            elif what == "deadline":
                self._deadline(of)  # type: ignore[arg-type]
            else:
                self._count(*of)  # type: ignore[misc]
            self._send()

    def _admit(self, plan: Plan, cap: int, budget: float, seed: bytes) -> None:
        expected = self.expected.votes(plan, cap)
        wait = self.schedule.wait_for(expected, budget, self.now, self.rate.speed) if self.schedule.jobs else 0.0
        if wait > 0:
            self.refused.append((self.now, wait))
            return
        job = self.schedule.admit(expected, budget, self.now, self.rate.speed)
        run = Certification(plan, classes=3, sigma=0.25, cap=cap)
        arrived = self.now

        def wake() -> None:
            run = job.run
            assert run is not None
            if run.done and not job.left:
                self.schedule.leave(job)
                self.finished.append((arrived, job.deadline, self.now, run.drawn))
                self.voted += run.drawn
                self.expected.learn(plan, cap, run.drawn)

        job.begin(run, X, seed, wake)
        self.at(job.deadline, "deadline", (job, arrived))

    def _deadline(self, of: tuple[Job, float]) -> None:
        job, arrived = of
        if not job.left:
            assert job.run is not None
            job.run.stop("deadline")
            self.schedule.leave(job)
            self.finished.append((arrived, job.deadline, float("inf"), job.run.drawn))

    def _send(self) -> None:
        while (call := self.schedule.next_call(self.rate.speed)) is not None:
            if isinstance(call, Drive):
                self.rate.lent(call, call.passes, self.now + call.for_s, self.now)
                Driver(self, call).go_on()
                continue
            self.rate.sent(call.passes, self.now)
            tasks = tuple(Task(X, job.seed, draw) for job, draw in call.pieces)
            asked = VoterCall(tasks, 3, packed(tasks, BATCH_SIZES[: 1 if call.small else None]), call.turn)
            self.sent[asked] = (call, self.now)
            self.calls.add(asked)
        while self.busy < self.workers and (found := self.calls.next_pass()) is not None:
            self.busy += 1
            self.computed += sum(len(draw) for _, draw in found[1])
            size = next(size for size in BATCH_SIZES if size >= sum(len(draw) for _, draw in found[1]))
            self.at(self.now + size * self.workers / RATE, "votes", found)

    def _count(self, asked: VoterCall, batch: Batch) -> None:
        self.busy -= 1
        asked.count(batch, np.concatenate([logits_of(draw, asked.tasks[i].seed) for i, draw in batch]))
        if asked.votes.done():
            if isinstance(sent := self.sent.pop(asked), Driver):
                sent.go_on()
                return
            call, sent_at = sent
            self.rate.counted(call.passes, len(call), self.now - sent_at, self.now)
            self.schedule.count(call, asked.votes.result())


class Driver:
    """A run that the computed voter drives, as `drive` does."""

    def __init__(self, simulation: Simulation, lent: Drive) -> None:
        self.simulation, self.lent, self.run = simulation, lent, copy.deepcopy(lent.job.run)
        assert self.run is not None
        self.end, self.over = min(simulation.now + lent.for_s, lent.job.deadline - 0.05), False
        self.pass_s = 0.0
        self.submitted: dict[VoterCall, float] = {}
        self.window: Window[VoterCall] = Window(self.run, BATCH_SIZES[: 1 if lent.small else None], simulation.workers)

    def go_on(self) -> None:
        """Counts the passes that are there, and asks for more, or gives the run back."""
        assert self.run is not None
        if self.over:
            return
        while (oldest := self.window.oldest) is not None and oldest.votes.done():
            self.window.count(oldest.votes.result())
            self.pass_s = self.simulation.now - self.submitted.pop(oldest)
        if self.simulation.now + self.pass_s < self.end:
            self.window.fill(self.submit)
        if self.run.done or self.lent.job.left or self.window.oldest is None:
            self.over = True
            for left in self.window.drain():
                left.votes.cancel()
            before = self.lent.job.run
            assert before is not None
            self.simulation.rate.given_back(self.lent, self.run.drawn - before.drawn, self.simulation.now)
            self.simulation.schedule.go_on(self.lent, self.run)

    def submit(self, draws: list[Draw]) -> VoterCall:
        tasks = [Task(X, self.lent.job.seed, draw) for draw in draws]
        call = VoterCall(tuple(tasks), 3, packed(tasks, BATCH_SIZES), self.lent.turn)
        self.simulation.sent[call] = self
        self.submitted[call] = self.simulation.now
        self.simulation.calls.add(call)
        return call


def latencies(simulation: Simulation, n_at_most: int) -> list[float]:
    return sorted(end - arrived for arrived, _, end, n in simulation.finished if n <= n_at_most)


def test_short_requests_overtake_a_long_one() -> None:
    alone, beside = Simulation(), Simulation()
    beside.arrive(0.0, *LONG, 300.0)
    for simulation in (alone, beside):
        for _ in range(3):
            simulation.expected.learn(*SHORT, 600)
        for i in range(20):  # three in five of the capacity
            simulation.arrive(1.0 + 0.2 * i, *SHORT, 60.0)
        simulation.run()
    p95 = [latencies(simulation, 600)[18] for simulation in (alone, beside)]
    assert len(beside.finished) == 21
    assert p95[1] < 2 * p95[0]


@pytest.mark.parametrize("workers", [1, 8])
def test_what_is_admitted_is_answered_in_time_at_ten_times_the_capacity(workers: int) -> None:
    simulation = Simulation(workers)
    generator = np.random.Generator(np.random.PCG64(1))
    plans = [SHORT, (Plan(n=100_000, tolerance=0.05), 10_000), (Plan(n=100_000, radius=0.25), 10_000)]
    when = 0.0
    for i in range(400):
        when += generator.exponential(0.02)
        budget, one_in = float(generator.choice([2.0, 5.0, 10.0])), int(generator.choice([3, 4, 8, 50]))
        simulation.arrive(when, *plans[i % 3], budget, one_in)  # which needs the more votes, the more agree
    simulation.run()
    late = [end for _, deadline, end, _ in simulation.finished if end > deadline]
    assert len(simulation.finished) + len(simulation.refused) == 400
    assert len(simulation.refused) > 200
    assert len(late) <= 1  # of the first, when little is known of what their kinds use
    ends = [end for _, _, end, _ in simulation.finished if end < float("inf")]
    assert simulation.voted > 0.8 * RATE * max(ends)  # the voters are used, and little is thrown away


def test_little_is_drawn_that_no_answer_uses() -> None:
    simulation = Simulation()
    for i in range(40):
        simulation.arrive(0.001 * i, Plan(n=100_000, tolerance=0.05), 10_000, 600.0)
    simulation.run()
    assert simulation.voted > 0.85 * simulation.computed


@pytest.mark.parametrize("budget", [2.0, 4.0])
def test_a_request_is_admitted_after_the_time_that_a_refusal_names(budget: float) -> None:
    asked = (Plan(n=100_000, tolerance=0.0001), 5_000, budget)

    def refused(when: Sequence[float]) -> list[tuple[float, float]]:
        simulation = Simulation()
        for _ in range(3):
            simulation.expected.learn(*SHORT, 600)
        for i in range(30):
            simulation.arrive(0.01 * i, *SHORT, 60.0)
        for at in when:
            simulation.arrive(at, *asked)
        simulation.run()
        return simulation.refused

    ((at, wait),) = refused([0.5])
    polls = [at + 0.1 * i for i in range(60)]
    times = {when for when, _ in refused(polls)}
    truth = next(when for when in polls if when not in times) - at
    assert wait / 2 <= truth <= 2 * wait


def test_a_request_that_finds_nobody_in_work_is_admitted_however_long_it_takes() -> None:
    simulation = Simulation()
    simulation.arrive(0.0, *LONG, 1.0)
    simulation.run()
    assert not simulation.refused
    ((_, _, _, n),) = simulation.finished
    assert n > 0.8 * RATE  # what can be voted on in a second


def test_the_error_of_one_input_reaches_no_request_that_shares_its_pass() -> None:
    schedule = Schedule((64, 256), 2, 2)
    runs = [Certification(SHORT[0], classes=3, sigma=0.25) for _ in range(2)]
    jobs = [schedule.admit(Expected(10_000, 10_000), 60.0, 0.0, SPEED) for _ in runs]  # too long to be lent
    for job, run in zip(jobs, runs, strict=True):
        job.begin(run, X, b"", lambda: None)
    broken = ValueError("no class there")
    while (made := schedule.next_call(SPEED)) is not None:
        assert isinstance(made, Count)
        if jobs[0] in made.jobs:
            schedule.fail(made, broken)
        else:
            schedule.count(made, [votes_of(draw) for _, draw in made.pieces])
    assert jobs[0].error is broken
    assert jobs[1].error is None
    assert runs[1].done


def test_a_run_of_which_votes_are_awaited_is_not_lent() -> None:
    """It would go on without them, and they would be lost when it comes back."""
    schedule = Schedule((64, 256), 2, 2)
    jobs = [schedule.admit(Expected(10_000, 10_000), 60.0, 0.0, SPEED) for _ in range(2)]
    for job in jobs:
        job.begin(Certification(SHORT[0], classes=3, sigma=0.25), X, b"", lambda: None)
    shared = []
    while (made := schedule.next_call(SPEED)) is not None:
        assert isinstance(made, Count)
        shared += [made] if len(made.jobs) == 2 else []
    for call in shared:
        schedule.fail(call, ValueError("no class there"))  # each job's part is to be tried alone
    assert shared
    schedule.leave(jobs[0])
    jobs[1].expected = Expected(160, 160)  # short enough
    for _ in range(len(shared)):
        again = schedule.next_call(SPEED)
        assert isinstance(again, Count)
        assert again.jobs == [jobs[1]]


@pytest.mark.parametrize("lent", [True, False])
def test_votes_of_a_request_that_has_left_are_dropped_and_its_passes_are_of_no_use(lent: bool) -> None:
    schedule = Schedule((64, 256), 2, 2)  # of which one drives a short run
    expected = Expected(160, 160) if lent else Expected(100_000, 100_000)
    job = schedule.admit(expected, 60.0, 0.0, SPEED)
    run = Certification(SHORT[0], classes=3, sigma=0.25)
    job.begin(run, X, b"", lambda: None)
    made = schedule.next_call(SPEED)
    assert made is not None
    assert made.of_use
    schedule.leave(job)
    assert not made.of_use
    if isinstance(made, Drive):
        assert lent
        schedule.go_on(made, copy.deepcopy(run))
        assert job.run is run
    else:
        assert not lent
        schedule.count(made, [votes_of(draw) for _, draw in made.pieces])
    assert schedule.next_call(SPEED) is None
    assert schedule.backlog == 0


def test_a_stall_is_noticed_when_passes_are_late() -> None:
    rate = Rate(1_000.0, 0.1, 2)
    rate.sent(1, 0.0)
    assert rate.stalled_s(0.9) == 0
    assert rate.stalled_s(4.0) == 4.0
    rate.dropped(1, 4.0)
    assert rate.stalled_s(9.0) == 0  # nothing is in flight


def test_the_rate_is_that_of_voters_which_are_all_busy() -> None:
    rate = Rate(1.0, 0.1, 2)
    now = 0.0
    for _ in range(200):
        rate.sent(1, now)
        rate.sent(1, now)
        now += 0.1
        rate.counted(1, 256, 0.1, now)
        rate.counted(1, 256, 0.1, now)
        now += 10.0  # nothing to do
    assert rate.speed.votes_per_s == pytest.approx(5_120, rel=0.01)


def test_a_voter_that_drives_a_run_is_not_taken_for_slow_or_hung() -> None:
    rate = Rate(1_000.0, 0.1, 2)
    rate.lent("long", 3, 2.0, 0.0)
    rate.lent("short", 3, 2.1, 0.1)
    rate.given_back("short", 100, 0.2)
    assert rate.speed.votes_per_s == pytest.approx(1_000, rel=0.1)
    assert rate.stalled_s(1.9) == 0
    rate.sent(1, 1.9)
    assert rate.speed.votes_per_s == pytest.approx(1_000, rel=0.1)  # though it has given no votes yet
    assert rate.stalled_s(3.5) == 1.5
    rate.given_back("long", 3_500, 3.5)
    assert rate.speed.votes_per_s == pytest.approx(1_000, rel=0.1)
    rate.dropped(1, 3.5)
    assert rate.stalled_s(9.0) == 0


@pytest.mark.parametrize(("workers", "replicas"), [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_the_rate_is_known_from_runs_that_voters_drive(workers: int, replicas: int) -> None:
    """Each of `replicas` voters counts 1,000 votes per second. One of them drives a run, and then a client leaves."""
    rate = Rate(100.0, 0.1, workers * replicas)
    now = 0.0
    for i in range(60):
        rate.lent(i, workers, now + 1.0, now)
        now += 0.9
        rate.given_back(i, None if i % 3 == 2 else 900, now)
        now += 10.0
    assert rate.speed.votes_per_s == pytest.approx(1_000 * replicas, rel=0.02)


def test_requests_of_a_kind_are_expected_to_use_what_such_requests_used() -> None:
    expected, plan = Expectations(), Plan(n=100_000, tolerance=0.05)
    assert (expected.votes(plan, 10_000).mean, expected.votes(plan, 10_000).sure) == (10_100, 0)
    expected.learn(plan, 10_000, 3_000)
    first = expected.votes(plan, 10_000)
    assert first.mean == 3_000
    assert first.sure == 0  # one says nothing about how much others differ
    for used in [2_000, 4_000] * 50:
        expected.learn(plan, 10_000, used)
    known = expected.votes(plan, 10_000)
    assert known.mean == pytest.approx(3_000, rel=0.05)
    assert known.deviation == pytest.approx(1_000, rel=0.05)
    assert known.sure == pytest.approx(2_000, rel=0.1)
    assert expected.votes(Plan(n=100_000, tolerance=0.1), 10_000).mean == 10_100
