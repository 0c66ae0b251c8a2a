"""The voter deployment: it computes votes for whoever asks, and keeps nothing between requests but warm voters."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError

from macer_serve.serving.ports import keep_to_loopback
from macer_serve.serving.voter_model import VoterModel
from macer_serve.serving.voter_replica import DriveRequest, ModelVoter, VoterDescription, VoteRequest
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.votes import Votes

log = logging.getLogger("ray.serve")

_ASKED_S = 3.0  # for a replica that serves already to name its models
_UNUSED_S = 120.0  # longer than a request of the previous deployment lasts, by default


class VoterDeployment:
    """One replica: a warm voter of its model, and of the model that it replaces while requests need it.

    The replica is ready when it can vote on its own model and on those that the running replicas hold. So a request
    that the previous deployment has begun is finished by its own model, by whichever replica is left.
    """

    async def __init__(self, model: VoterModel) -> None:  # type: ignore[misc]  # Serve awaits it
        keep_to_loopback()
        self._model = model
        self._voters: dict[VoterModel, asyncio.Task[ModelVoter]] = {}
        self._used: dict[VoterModel, float] = {}
        asked = asyncio.create_task(_models_of_running_replicas())
        await self._voter(model)
        for other in await asked:
            try:
                await self._voter(other)
            except Exception:  # this deployment must come up without the previous one's model
                log.exception("requests of the previous deployment cannot be finished by this voter")
        self._releasing = asyncio.create_task(self._release_unused())

    async def models(self) -> list[VoterModel]:
        """Returns the models of which this replica holds a voter."""
        return list(self._voters)

    async def describe(self, model: VoterModel) -> VoterDescription:
        """Returns the voter's description. Raises as `ModelVoter` does for a model that cannot be loaded."""
        return await (await self._voter(model)).describe()

    # Generators of one value each: Serve's router then hears at once that a replica has taken a call, and how many it
    # has. By gRPC it would hear that with the result, and would send to a replica that hangs.

    async def count(self, model: VoterModel, request: VoteRequest) -> AsyncIterator[list[Votes]]:
        """Yields the votes of the request. Raises as `ModelVoter.count` does."""
        yield await (await self._voter(model)).count(request)

    async def drive(self, model: VoterModel, request: DriveRequest) -> AsyncIterator[Certification]:
        """Yields the run of the request as far as it has come. Raises as `ModelVoter.drive` does."""
        yield await (await self._voter(model)).drive(request)

    async def _voter(self, model: VoterModel) -> ModelVoter:
        """Returns the warm voter of a model; it is loaded aside if there is none yet."""
        self._used[model] = time.monotonic()
        if (loading := self._voters.get(model)) is None:
            loading = asyncio.create_task(asyncio.to_thread(ModelVoter, model))
            self._voters[model] = loading
        try:
            return await asyncio.shield(loading)  # a request that is cancelled leaves the voter to the others
        except Exception:
            if self._voters.get(model) is loading:
                del self._voters[model]  # the next request tries again
            raise

    async def _release_unused(self) -> None:
        """Closes the voters of models that only a previous deployment served."""
        while True:
            await asyncio.sleep(_UNUSED_S / 4)
            for model, loading in list(self._voters.items()):
                unused = time.monotonic() - self._used[model] > _UNUSED_S
                if model != self._model and unused and loading.done() and not loading.exception():
                    del self._voters[model], self._used[model]
                    loading.result().close()
                    log.info("the voter of the previous model %s is released", model.digest)


async def _models_of_running_replicas() -> list[VoterModel]:
    """Returns the models that a running replica of this deployment holds; none if no replica runs."""
    context = serve.get_replica_context()
    handle: Any = serve.get_deployment_handle(context.deployment, context.app_name)
    try:
        async with asyncio.timeout(_ASKED_S):
            models: list[VoterModel] = await handle.models.remote()
    except (TimeoutError, RayError, AioRpcError, DeploymentUnavailableError):
        return []
    return models
