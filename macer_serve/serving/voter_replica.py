"""The voter deployment: it computes votes for whoever asks, and keeps nothing between requests."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from ray import serve

from macer_serve.checkpoint import load_checkpoint
from macer_serve.errors import EngineMismatchError
from macer_serve.serving.ports import keep_to_loopback
from macer_serve.serving.settings import ModelSettings
from macer_serve.smoothing.noise import FixedPoint
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.voters import Task, open_voter

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Votes wanted of one input, at most a pass of copies in all; `engine` is the one that must compute them."""

    x: FixedPoint
    seed: bytes
    draws: tuple[Draw, ...]
    engine: str

    def __len__(self) -> int:
        return sum(len(draw) for draw in self.draws)


@dataclass(frozen=True, slots=True)
class VoterDescription:
    """What an ingress must know of a voter: its checkpoint and engine, copies per pass, and passes at a time.

    `passes` counts the forward passes of this replica since its start.
    """

    digest: str
    engine: str
    batch_sizes: tuple[int, ...]
    workers: int
    passes: int


def copies(requests: list[VoteRequest]) -> int:
    """Returns the number of noisy copies in a batch of requests. `serve.batch` limits this number."""
    return sum(len(request) for request in requests)


class VoterReplica:
    """One voter, warmed up before the replica is ready. Small requests of different inputs share a pass."""

    def __init__(self, settings: ModelSettings) -> None:
        keep_to_loopback()
        config, classifier = load_checkpoint(settings.checkpoint)
        self._voter = open_voter(classifier, sigma=config.sigma, noise=settings.noise, options=settings.voter)
        self._digest, self._passes = config.digest, 0
        log.info("voter %s: %s", config.name, self._voter.engine)
        # Sizes are known only now, so that the batching wrapper is put on here and not on a method.
        self._pass = serve.batch(
            max_batch_size=self._voter.batch_sizes[-1],
            batch_wait_timeout_s=0.0,
            max_concurrent_batches=self._voter.workers,
            batch_size_fn=copies,
        )(self._one_pass)

    async def describe(self) -> VoterDescription:
        """Returns the voter's description. A replica that answers is ready, because warm-up comes first."""
        voter = self._voter
        return VoterDescription(self._digest, voter.engine, voter.batch_sizes, voter.workers, self._passes)

    async def count(self, request: VoteRequest) -> list[Votes]:
        """The votes of each draw, hard or soft.

        Raises `EngineMismatchError` where this is not the engine that computed the request's other votes.
        """
        if request.engine != self._voter.engine:
            log.error("refusing votes: this replica is %s, the request is on %s", self._voter.engine, request.engine)
            raise EngineMismatchError(f"this voter is {self._voter.engine}, not {request.engine}")
        votes: list[Votes] = await self._pass(request)
        return votes

    async def _one_pass(self, requests: list[VoteRequest]) -> list[list[Votes]]:
        """The votes of each request, by one forward pass. Ray has taken out those that were cancelled before it."""
        tasks = [Task(request.x, request.seed, draw) for request in requests for draw in request.draws]
        self._passes += 1
        counted: list[Votes] = await asyncio.wrap_future(self._voter.submit(tasks))
        votes = iter(counted)
        return [[next(votes) for _ in request.draws] for request in requests]
