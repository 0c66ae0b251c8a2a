"""The cluster's voters as the ingress sees them: every step of votes goes through one handle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from macer_serve.errors import EngineMismatchError
from macer_serve.serving.problems import UnavailableError
from macer_serve.serving.voter_replica import VoterDescription, VoteRequest
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.noise import FixedPoint
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.smoothing.window import Window

log = logging.getLogger("ray.serve")

_ATTEMPTS = 5


class RemoteVoter:
    """A window of draws in flight over all replicas of one voter deployment, which must hold checkpoint `digest`."""

    def __init__(self, handle: Any, replicas: int, digest: str) -> None:
        self._handle, self._replicas, self._digest = handle, replicas, digest

    async def describe(self, timeout_s: float = 10.0) -> VoterDescription:
        """What a replica says of itself.

        Raises `UnavailableError` where none answers in time, or where it has loaded another checkpoint than the
        ingress: certificates would name the wrong one.
        """
        try:
            async with asyncio.timeout(timeout_s):
                voter: VoterDescription = await self._handle.describe.remote()
        except (TimeoutError, RayError, DeploymentUnavailableError, BackPressureError) as error:
            raise UnavailableError("no voter answers; try again shortly") from error
        if voter.digest != self._digest:
            log.error("the voter holds checkpoint %s, the ingress %s: restart the server", voter.digest, self._digest)
            raise UnavailableError("the checkpoint was replaced while it was served; the server must be restarted")
        return voter

    async def drive(
        self,
        run: Certification,
        x: FixedPoint,
        seed: bytes,
        voter: VoterDescription,
        progress: Callable[[Certification], None] = lambda run: None,
    ) -> None:
        """Run the certification of `x` under `seed` to its end; `progress` is called after each step.

        Every vote is by the engine described. Cancelling this coroutine cancels what is in flight. Raises
        `UnavailableError` if no replica of that engine answers.
        """

        def submit(draws: list[Draw]) -> asyncio.Task[list[Votes]]:
            request = VoteRequest(x, seed, tuple(draws), voter.engine)
            return asyncio.create_task(self._count(request))

        window: Window[asyncio.Task[list[Votes]]] = Window(run, voter.batch_sizes, voter.workers * self._replicas)
        try:
            window.fill(submit)
            while (pending := window.oldest) is not None and not run.done:
                window.count(await pending)
                progress(run)
                window.fill(submit)  # nothing, if the run is done
        finally:
            left = list(window.drain())
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _count(self, request: VoteRequest) -> list[Votes]:
        """Returns the votes of one pass. If a replica fails, the same draws are repeated and give the same votes."""
        for attempt in range(_ATTEMPTS):
            response = self._handle.count.remote(request)
            try:
                return await response  # type: ignore[no-any-return]
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
                if isinstance(error, RayTaskError) and not isinstance(error, EngineMismatchError):
                    raise
                why = type(error).__name__
            log.warning("%d votes are asked for again: %s", len(request), why)
            await asyncio.sleep(0.1 * 2**attempt)
        raise UnavailableError("no voter of the engine that began this certificate is left; try again")
