"""`macer serve`: starts Ray and the application, changes it, and lets requests end before it stops."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import ray
from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import DeploymentUnavailableError

from macer_serve.errors import MacerError, ServingError, first_line
from macer_serve.ray_cluster import start_ray
from macer_serve.serving import changes
from macer_serve.serving.app import NO_KEY
from macer_serve.serving.changes import POLL_S, application, settled
from macer_serve.serving.deployment import Deployment
from macer_serve.serving.ports import require_free
from macer_serve.serving.signals import Signals

_ALIVE_S = 5.0  # between two looks whether Ray is still there
_MARGIN_S = 10.0  # for Serve to stop what has nothing to do any more


def run(path: Path | None, *, verbose: bool, tell: Callable[[str], None]) -> None:
    """Serves the YAML file, or the bundled one, until SIGTERM or SIGINT; then lets requests in work end.

    SIGHUP has the file read again, and deployed. `tell` is given one line each for a missing key, for readiness, for
    each change or its refusal, and for the shutdown. `environment.prepare` must have been called. Before Ray starts,
    raises `ParameterError`, `IssuerKeyError` and `CheckpointError` for what the YAML names wrongly, and `ServingError`
    for a port that is taken. After that, raises what a voter raised at its start, or `ServingError`.
    """
    with tempfile.TemporaryDirectory(prefix="macer-serve-") as folder, Signals().handled() as signals:
        key_file = Path(folder, "issuer.key")  # of this start, if the YAML names none
        deployment = settled(path, key_file)
        require_free(deployment.host, deployment.port)
        if key_file.exists():
            tell(NO_KEY)
        try:
            _start(deployment, verbose, signals)
            if not signals.stop.is_set():
                tell(f"ready: {deployment.url}")
                deployment = _serve(deployment, path, key_file, signals, tell)
            tell("shutting down: requests in flight are answered, new ones are refused")
            _drain(deployment, tell)
        finally:
            ray.shutdown()  # ends the Ray instance with everything in it


def _start(deployment: Deployment, verbose: bool, signals: Signals) -> None:
    """Returns once the application answers /readyz, or `stop` is set. Raises as `run` does."""
    schema, level = deployment.schema, logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray").setLevel(level)
    try:
        start_ray(
            address="local",
            namespace="serve",
            num_cpus=changes.room_for(deployment.settings),
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=level,
        )
        signals.handle()  # Ray has put its own handlers in their place
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(level)
        serve.start(
            proxy_location=schema.proxy_location,
            http_options=schema.http_options.model_dump(),
            logging_config=schema.logging_config,
        )
    except Exception as error:
        raise changes.cause(str(error)) from error
    changes.deploy(deployment)
    changes.until_running(deployment, signals.stop)
    while not signals.stop.is_set() and not _answers(deployment.url + "readyz"):
        signals.stop.wait(POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _serve(
    deployment: Deployment, path: Path | None, key_file: Path, signals: Signals, tell: Callable[[str], None]
) -> Deployment:
    """Returns the deployment that runs when `stop` is set. Raises `ServingError` if Ray is gone."""
    looked = time.monotonic()
    while not signals.stop.wait(POLL_S):
        if signals.change.is_set():
            signals.change.clear()
            deployment = _changed(deployment, path, key_file, signals.stop, tell)
        if time.monotonic() - looked > _ALIVE_S:
            _require_alive(deployment)
            looked = time.monotonic()
    return deployment


def _changed(
    old: Deployment, path: Path | None, key_file: Path, stop: threading.Event, tell: Callable[[str], None]
) -> Deployment:
    """Returns the deployment that runs once the file is read again: `old`, if the new one is refused."""
    _require_alive(old)
    try:
        new = settled(path, key_file)
        if not changes.change(old, new, stop):
            tell("not changed: the deployment and the files that it names are as before")
            return old
    except MacerError as error:
        tell(f"not changed: {error}")
        return old
    if not stop.is_set():
        tell("changed: the new deployment answers")
    return new


def _require_alive(deployment: Deployment) -> None:
    try:
        application(deployment)
    except Exception as error:
        raise ServingError(f"the server has ended: {first_line(error)}") from error


def _drain(deployment: Deployment, tell: Callable[[str], None]) -> None:
    """Returns when every ingress replica refuses new requests and has answered those in work, or grace is over.

    During a change, the replicas of the previous deployment do not take part: they end when their requests are
    answered. Voters must live until then, hence nothing is deleted before.
    """
    if not ray.is_initialized() or deployment.name not in serve.status().applications:
        return
    grace_s = deployment.settings.limits.grace_s
    end = time.monotonic() + grace_s + _MARGIN_S
    try:
        asyncio.run(_ingress_drained(deployment, grace_s, end))
    except DeploymentUnavailableError:
        pass  # an ingress that never came up has no requests
    except Exception as error:  # the server ends in any case
        tell(f"the ingress cannot be drained, requests in work may be cut off: {first_line(error)}")
    serve.delete(deployment.name, _blocking=False)  # meanwhile the proxies send what the ingress has written
    while deployment.name in serve.status().applications and time.monotonic() < end:
        time.sleep(POLL_S)


async def _ingress_drained(deployment: Deployment, grace_s: float, end: float) -> None:
    """Returns when no ingress replica has requests in work, or at `end`. In a coroutine, because Serve routes in it."""
    handle = serve.get_app_handle(deployment.name)
    while True:
        left_s = max(0.0, end - time.monotonic())
        await handle.broadcast("drain", grace_s).results_async(timeout_s=left_s)
        states = application(deployment).deployments["ingress"].replica_states
        if set(states) <= {ReplicaState.RUNNING} or time.monotonic() > end:
            return
        await asyncio.sleep(POLL_S)
