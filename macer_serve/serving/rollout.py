"""What a new ingress replica waits for while it replaces one that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.schema import ApplicationStatusOverview

_POLL_S = 0.25


async def until_voters_are_new(models: Iterable[str]) -> None:
    """Returns when the voters of these models are all of this deployment, or if no other ingress replica serves.

    Until then, the ingress of the previous deployment serves with voters that hold its models. To be called in an
    ingress replica.
    """
    context = serve.get_replica_context()
    while _must_wait(await asyncio.to_thread(_status, context.app_name), context.deployment, models):
        await asyncio.sleep(_POLL_S)


def _status(application: str) -> ApplicationStatusOverview | None:
    return serve.status().applications.get(application)


def _must_wait(status: ApplicationStatusOverview | None, ingress: str, models: Iterable[str]) -> bool:
    """Returns whether another ingress replica runs while voters are being replaced."""
    deployments = {} if status is None else status.deployments
    return (
        ingress in deployments
        and bool(deployments[ingress].replica_states.get(ReplicaState.RUNNING))
        and any(
            deployments[name].status == "UPDATING"
            for name in (f"voter-{model}" for model in models)
            if name in deployments
        )
    )
