"""A warm voter of one model, as a replica of the voter deployment holds it."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from macer_serve.checkpoint import load_checkpoint
from macer_serve.checkpoint.pinned import pinned
from macer_serve.errors import EngineMismatchError
from macer_serve.serving.voter_model import VoterModel
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.noise import FixedPoint
from macer_serve.smoothing.votes import Votes
from macer_serve.voters import Task, drive, open_voter

log = logging.getLogger("ray.serve")

_DRIVERS = 64  # runs driven at a time; each ingress replica lends few


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Votes wanted of some inputs; `engine` is the one that must compute them.

    `turn_s` says in how many seconds its turn comes; it is negative if it has come already. `small` asks for small
    passes, so that other requests wait less.
    """

    tasks: tuple[Task, ...]
    engine: str
    turn_s: float
    small: bool


@dataclass(frozen=True, slots=True)
class DriveRequest:
    """A run to be driven for input `x` under `seed`, to its end or for `for_s` seconds, and `stop_s` at most.

    See `VoteRequest` and `macer_serve.voters.drive`.
    """

    run: Certification
    x: FixedPoint
    seed: bytes
    engine: str
    turn_s: float
    small: bool
    for_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class VoterDescription:
    """What an ingress must know of a voter: its checkpoint and engine, copies per pass and passes at a time.

    `votes_per_s` was measured at warm-up, `start_s` is how long the voter took to start.
    """

    digest: str
    engine: str
    batch_sizes: tuple[int, ...]
    workers: int
    votes_per_s: float
    start_s: float


class ModelVoter:
    """One voter, warmed up in the constructor."""

    def __init__(self, model: VoterModel) -> None:
        began = time.monotonic()
        config, classifier = load_checkpoint(pinned(model.digest, model.checkpoint))
        self._voter = open_voter(classifier, sigma=config.sigma, noise=model.noise, options=model.options)
        self._drivers = ThreadPoolExecutor(_DRIVERS, "driver")
        self._digest = config.digest
        self._start_s = time.monotonic() - began
        log.info("voter %s: %s", config.name, self._voter.engine)

    async def describe(self) -> VoterDescription:
        """Returns the voter's description. A replica that answers is ready, because warm-up comes first."""
        voter = self._voter
        return VoterDescription(
            digest=self._digest,
            engine=voter.engine,
            batch_sizes=voter.batch_sizes,
            workers=voter.workers,
            votes_per_s=voter.votes_per_s,
            start_s=self._start_s,
        )

    async def count(self, request: VoteRequest) -> list[Votes]:
        """Returns the votes of each task, hard or soft. At every pass, requests go in the order of their turns.

        Raises `EngineMismatchError` if this is not the engine that computed the request's other votes.
        """
        self._require(request.engine)
        turn = time.monotonic() + request.turn_s
        return await asyncio.wrap_future(self._voter.submit(request.tasks, turn, small=request.small))

    async def drive(self, request: DriveRequest) -> Certification:
        """Returns the run of the request as far as it has come. Raises as `count` does."""
        self._require(request.engine)
        run, turn = request.run, time.monotonic() + request.turn_s
        halt: Future[None] = Future()

        driven = partial(drive, run, request.x, request.seed, self._voter, turn=turn, small=request.small)
        limited = partial(driven, for_s=request.for_s, stop_s=request.stop_s, halt=halt)
        try:
            await asyncio.get_running_loop().run_in_executor(self._drivers, limited)
        finally:
            halt.set_result(None)  # whoever asked may have left
        return run

    def _require(self, engine: str) -> None:
        """Raise `EngineMismatchError` unless the voter is of this engine."""
        if engine != self._voter.engine:
            log.error("refusing votes: this replica is %s, the request is on %s", self._voter.engine, engine)
            raise EngineMismatchError(f"this voter is {self._voter.engine}, not {engine}")

    def close(self) -> None:
        """Ends the voter's threads, after the passes that they have begun."""
        self._voter.close()
        self._drivers.shutdown(wait=False)
