"""What admission needs to know: how fast the voters are, and how many votes a request of some plan uses. No clock."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from macer_serve.smoothing.plan import Plan

_MEMORY_S = 5.0  # seconds of counting that the measured rate remembers
_KINDS = 1024  # kinds of plans that are remembered
_LEARNT = 0.1  # weight of the newest answer in a mean
# A call is late after so many times the mean time of a call, and not before so many seconds.
_LATE_CALLS = 5
_LATE_S = 1.0


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast the voters count: votes per second, and seconds from sending a call to its votes."""

    votes_per_s: float
    call_s: float


class Rate:
    """Votes per second that the voters count while all of them have work.

    `initial` is the estimate before the first call, `call_s` that of the seconds from sending a call to its votes.
    `workers` passes run at a time. All times are seconds of the caller's clock.
    """

    def __init__(self, initial: float, call_s: float, workers: int) -> None:
        self.call_s, self._workers = call_s, workers
        self._votes, self._busy_s = initial, 1.0  # of all workers; half of them busy for a second are half a second
        self._in_flight, self._since = 0, 0.0  # passes
        # Runs that voters drive: their passes, and until when they may be silent. Their votes are added in advance, at
        # the present rate, and put right when they come back; what was added has faded meanwhile.
        self._lent: dict[object, tuple[int, float]] = {}
        self._added = self._added_left = 0.0
        self._silent_since: float | None = None  # no call has ended since, and some are in flight

    def sent(self, passes: int, now: float) -> None:
        """Takes note that a call of so many passes was sent."""
        self._pass_time(now)
        self._in_flight += passes
        if self._silent_since is None:
            self._silent_since = now

    def lent(self, run: object, passes: int, until: float, now: float) -> None:
        """Takes note that a run was sent, which a voter drives until `until` with so many passes in work."""
        self.sent(passes, now)
        self._lent[run] = passes, until

    def counted(self, passes: int, votes: int, took_s: float, now: float) -> None:
        """Takes note that a call of so many votes has ended, `took_s` after it was sent."""
        self.dropped(passes, now)
        self._votes += votes
        self.call_s += 0.1 * (took_s - self.call_s)

    def given_back(self, run: object, votes: int | None, now: float) -> None:
        """Takes note that a run has come back with so many votes more. None says that nobody has waited for them."""
        passes, _ = self._lent[run]
        self.dropped(passes, now)
        share = passes / self._driven
        added, left = share * self._added, share * self._added_left
        if votes is not None:
            self._votes += left * (votes / added - 1.0) if added else votes
        self._added, self._added_left = self._added - added, self._added_left - left
        del self._lent[run]

    def dropped(self, passes: int, now: float) -> None:
        """Takes note that a call has ended without votes."""
        self._pass_time(now)
        self._in_flight -= passes
        self._silent_since = now if self._in_flight else None

    @property
    def speed(self) -> Speed:
        """The speed while calls end."""
        return Speed(max(self._votes / self._busy_s, 1e-3), self.call_s)

    def stalled_s(self, now: float) -> float:
        """Returns for how long no call has ended although one should have; 0 if counting goes on."""
        may_be_silent = max((until for _, until in self._lent.values()), default=0.0)
        silent = 0.0 if self._silent_since is None else now - max(self._silent_since, may_be_silent)
        return silent if silent > self.patience_s else 0.0

    @property
    def patience_s(self) -> float:
        """The seconds after which a call is late."""
        return max(_LATE_S, _LATE_CALLS * self.call_s)

    @property
    def _driven(self) -> int:
        return sum(passes for passes, _ in self._lent.values())

    def _pass_time(self, now: float) -> None:
        """Adds the time since the last call to that of busy workers, and lets older counts fade."""
        busy = (now - self._since) * min(self._in_flight, self._workers) / self._workers
        kept = math.exp(-busy / _MEMORY_S)
        added = busy * self._votes / self._busy_s * self._driven / max(1, self._in_flight)
        self._added, self._added_left = self._added + added, kept * self._added_left + added
        self._votes, self._busy_s = kept * self._votes + added, kept * self._busy_s + busy
        self._since = now


@dataclass(frozen=True, slots=True)
class Expected:
    """The votes that a request is expected to use: their mean and standard deviation, and the most that it may use.

    If nothing is known, the mean is the most, and the deviation None.
    """

    mean: float
    most: float
    deviation: float | None = None

    @property
    def sure(self) -> float:
        """The number of votes that it will use with good probability."""
        return 0.0 if self.deviation is None else max(0.0, self.mean - self.deviation)


class Expectations:
    """What requests of each kind have used. A kind is what a plan asks for, with its cap."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[object, ...], tuple[int, float, float]] = OrderedDict()  # number, mean, variance

    def votes(self, plan: Plan, cap: int) -> Expected:
        """Returns what a request is expected to use: all that it may use, until one of its kind was answered."""
        most = float(plan.selection + cap)
        if (seen := self._seen.get(_kind(plan, cap))) is None:
            return Expected(most, most)
        _, mean, variance = seen
        return Expected(mean, most, math.sqrt(variance))

    def learn(self, plan: Plan, cap: int, used: int) -> None:
        """Takes in what a request has used, or at least what it would have used if its run was cut short."""
        kind, most = _kind(plan, cap), plan.selection + cap
        # The first ones say little about how much others differ: all that may be used counts as one of them.
        number, mean, variance = self._seen.pop(kind, (1, float(used), float(most - used) ** 2))
        weight, off = max(_LEARNT, 1 / (number + 1)), used - mean
        self._seen[kind] = (number + 1, mean + weight * off, (1 - weight) * (variance + weight * off**2))
        if len(self._seen) > _KINDS:
            self._seen.popitem(last=False)


def _kind(plan: Plan, cap: int) -> tuple[object, ...]:
    """Returns what decides how many votes a plan uses, with values that clients choose rounded."""
    rounded = [None if value is None else float(f"{value:.1g}") for value in (plan.radius, plan.tolerance, plan.alpha)]
    return (plan.mode, plan.bound, *rounded, float(f"{cap:.2g}"))
