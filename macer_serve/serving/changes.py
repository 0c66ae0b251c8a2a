"""How the deployment of a running `macer serve` is replaced by another one, without a request that fails."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from macer_serve import errors
from macer_serve.errors import MacerError, ParameterError, ServingError
from macer_serve.issuing import Issuer
from macer_serve.serving.app import check, voters_need
from macer_serve.serving.deployment import Deployment, read_deployment
from macer_serve.serving.settings import AppSettings

POLL_S = 0.25


def settled(path: Path | None, key_file: Path) -> Deployment:
    """Returns the deployment of a YAML file with the digests of its checkpoints and the id of its key, as they are now.

    So Serve notices if a file is another one, although its name is the same. `key_file` is taken if the YAML names no
    key, and made if it is not there. Raises as `read_deployment` and `check` do.
    """
    deployment = read_deployment(path)
    configs = check(deployment.settings)
    schema = deployment.schema.model_copy(deep=True)
    arguments = schema.applications[0].args
    for name, config in configs.items():
        arguments["models"][name]["digest"] = config.digest
    if deployment.settings.key_file is None:
        if not key_file.exists():
            Issuer.new().save(key_file)
        arguments["key_file"] = str(key_file)
    arguments["key_id"] = Issuer.load(arguments["key_file"]).key_id
    return Deployment(schema, AppSettings.model_validate(arguments))


def room_for(settings: AppSettings) -> int:
    """Returns the CPUs with which Ray must start, so that new voters have room beside the old ones."""
    return max(os.cpu_count() or 1, math.ceil(2 * voters_need(settings)["CPU"]))


def change(old: Deployment, new: Deployment, stop: threading.Event) -> bool:
    """Replaces the deployment; returns whether there was anything to change.

    Returns when the last request that `old` has begun is answered, or `stop` is set. Raises `ParameterError` for what
    cannot change while the server runs, and what a new voter raises that cannot start. The old deployment goes on then.
    """
    _require_changeable(old, new)
    if new.schema.applications == old.schema.applications:
        return False
    deploy(new)
    try:
        until_running(new, stop)
    except MacerError:
        deploy(old)
        until_running(old, stop)
        raise
    return True


def deploy(deployment: Deployment) -> None:
    """Hands the deployment to Serve, as `serve run` does."""
    client = _get_global_client()
    assert client is not None  # it raises otherwise
    client.deploy_apps(deployment.schema)


def until_running(deployment: Deployment, stop: threading.Event) -> None:
    """Returns when all replicas run and no old one is left, or `stop` is set. Raises what a replica raised."""
    while not stop.is_set() and (status := application(deployment)).status != "RUNNING":
        if status.status == "DEPLOY_FAILED":
            raise cause("\n".join([status.message, *(d.message for d in status.deployments.values())]))
        stop.wait(POLL_S)


def application(deployment: Deployment) -> Any:
    """Returns Serve's status of the application."""
    return serve.status().applications[deployment.name]


def cause(text: str) -> MacerError:
    """Returns the error of ours that a traceback of Serve ends with, or a `ServingError` with its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        name, _, message = line.partition(": ")
        kind = getattr(errors, name.rpartition(".")[2], None) if "macer_serve.errors." in name else None
        if isinstance(kind, type) and issubclass(kind, MacerError) and kind is not errors.MissingFactsError:
            return kind(message)
    return ServingError(f"the server cannot start: {(lines or ['no reason is given'])[-1][:300]}")


def _require_changeable(old: Deployment, new: Deployment) -> None:
    """Raises `ParameterError` for another address or name, or for voters without room."""

    def fixed(deployment: Deployment) -> dict[str, Any]:
        schema, (one,) = deployment.schema, deployment.schema.applications
        named = {name: value for name, value in schema.model_dump().items() if name != "applications"}
        return named | {"applications.0.name": one.name, "applications.0.route_prefix": one.route_prefix}

    before, after = fixed(old), fixed(new)
    if differ := [name for name in before if before[name] != after[name]]:
        raise ParameterError(f"{', '.join(differ)} cannot change while the server runs: end it, and start it again")
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, need in voters_need(new.settings).items():
        if need > there.get(kind, 0.0):
            raise ParameterError(
                f"the voters reserve {need:g} {kind}s, and the running server has {there.get(kind, 0.0):g}: end it, "
                "and start it again"
            )
