"""What a `Schedule` orders: the requests in work, and the calls that ask voters for their votes. Without a clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from macer_serve.serving.admission import Expected
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.noise import FixedPoint
from macer_serve.smoothing.votes import SOFT_LEVELS, Draw

# A run is sent to a voter and back only if each of its records holds at most so many numbers. The soft votes of many
# classes are megabytes.
_LIGHT = 50_000
# A run that has used the votes it was expected to use is expected to use this share of them again.
_EXPECTED_EXCESS = 0.25


@dataclass(slots=True, eq=False)
class Job:
    """A request in work, whose votes are to be counted before `deadline`, in seconds of the caller's clock.

    `begin` gives it a run; `watched` says that somebody wants to see the run grow. `wake` is called after votes were
    counted and when `error` is set.
    """

    expected: Expected
    deadline: float
    turn: float
    in_time: bool  # whether it was to be expected, at its admission, that it would be finished by its deadline
    run: Certification | None = None
    watched: bool = False
    x: FixedPoint | None = None
    seed: bytes = b""
    wake: Callable[[], None] = lambda: None
    error: Exception | None = None
    overtaken: int | None = None  # the number of copies that were handed out when a job came that goes before this one
    left: bool = False

    def begin(
        self, run: Certification, x: FixedPoint, seed: bytes, wake: Callable[[], None], *, watched: bool = False
    ) -> None:
        """Makes the job ask for copies of input `x` under `seed`, as `run` wants them."""
        self.run, self.x, self.seed, self.wake, self.watched = run, x, seed, wake, watched

    @property
    def wants_copies(self) -> bool:
        return not self.left and self.error is None and self.run is not None and not self.run.done

    @property
    def is_light(self) -> bool:
        """Whether the run can be sent in a moment."""
        return self.run is not None and self.run.classes * (SOFT_LEVELS if self.run.plan.soft else 1) <= _LIGHT

    @property
    def awaits_votes(self) -> bool:
        """Whether copies were handed out whose votes are not counted yet."""
        return self.run is not None and self.run.handed_out > self.run.drawn

    @property
    def attained(self) -> int:
        """The number of copies that were handed out."""
        return 0 if self.run is None else self.run.handed_out

    @property
    def certain(self) -> float:
        """The number of copies to be handed out still that the run will use, with good probability."""
        return 0.0 if self.run is None else max(float(self.run.due()), self.expected.sure - self.attained)

    @property
    def remaining(self) -> float:
        """The number of votes that the job is expected to need still."""
        if self.run is None:
            return self.expected.mean
        if self.run.done:
            return 0.0
        counted = self.run.drawn
        expected = max(self.expected.mean - counted, _EXPECTED_EXCESS * counted)
        return min(expected, self.run.most - counted)

    @property
    def limit(self) -> float:
        """The number of votes that the job may need still at most."""
        return self.expected.most - (0 if self.run is None else self.run.drawn)

    @property
    def variance(self) -> float:
        """The variance of `remaining`, in square votes."""
        return min(self.expected.deviation or 0.0, self.remaining) ** 2


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Call(ABC):
    """What one call asks a voter for, on behalf of some jobs.

    It keeps the voter busy with `passes` forward passes at a time. `small` asks for small ones, so that other calls
    wait less.
    """

    passes: int
    small: bool

    @property
    @abstractmethod
    def jobs(self) -> list[Job]:
        """The jobs that it is for, each once."""

    @property
    def turn(self) -> float:
        """When the turn of the first of its jobs comes."""
        return min(job.turn for job in self.jobs)

    @property
    def of_use(self) -> bool:
        """Whether some job still waits for what is asked."""
        return any(job.wants_copies for job in self.jobs)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Drive(Call):
    """A run that one voter drives by itself, for `for_s` seconds at most."""

    job: Job
    for_s: float

    @property
    def jobs(self) -> list[Job]:
        return [self.job]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Count(Call):
    """Pieces to be voted on, each with its job. They fill `passes` forward passes."""

    pieces: tuple[tuple[Job, Draw], ...]

    def __len__(self) -> int:
        return sum(len(draw) for _, draw in self.pieces)

    @property
    def jobs(self) -> list[Job]:
        return list(dict.fromkeys(job for job, _ in self.pieces))
