"""`macer serve`: starts Ray and the application, says when it is ready, and lets requests end before it stops."""

from __future__ import annotations

import logging
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from macer_serve import errors
from macer_serve.errors import MacerError, ServingError, first_line
from macer_serve.serving.app import NO_KEY, check
from macer_serve.serving.deployment import Deployment, read_deployment
from macer_serve.serving.ports import require_free

_POLL_S = 0.25


def run(path: Path | None, *, verbose: bool, tell: Callable[[str], None]) -> None:
    """Serves the YAML file, or the bundled one, until SIGTERM or SIGINT; then lets requests in flight end.

    `tell` is given one line each for a missing key, for readiness and for the shutdown. `environment.prepare` must have
    been called. Before Ray starts, raises `ParameterError`, `IssuerKeyError` and `CheckpointError` for what the YAML
    names wrongly, and `ServingError` for a port that is taken. After that, raises what a voter raised at its start, or
    `ServingError`.
    """
    deployment = read_deployment(path)
    check(deployment.settings, files=True)
    require_free(deployment.host, deployment.port)
    if deployment.settings.key_file is None:
        tell(NO_KEY)
    with _told_to_stop() as stop:
        try:
            _start(deployment, verbose, stop)
            if not stop.is_set():
                tell(f"ready: {deployment.url}")
                _watch(deployment, stop)
            tell("shutting down: requests in flight are answered, new ones are refused")
            _drain(deployment)
        finally:
            _end()


def _start(deployment: Deployment, verbose: bool, stop: threading.Event) -> None:
    """Returns once the application answers /readyz, or `stop` is set. Raises as `run` does."""
    schema, level = deployment.schema, logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray").setLevel(level)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(
            address="local",
            namespace="serve",
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=level,
        )
        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(level)
        serve.start(
            proxy_location=schema.proxy_location,
            http_options=schema.http_options.model_dump(),
            logging_config=schema.logging_config,
        )
    except Exception as error:
        raise _cause(str(error)) from error
    client = _get_global_client()
    assert client is not None  # it raises otherwise
    client.deploy_apps(schema)  # as `serve run` does
    while not stop.is_set() and (application := _application(deployment)).status != "RUNNING":
        if application.status == "DEPLOY_FAILED":
            messages = [application.message, *(d.message for d in application.deployments.values())]
            raise _cause("\n".join(messages))
        stop.wait(_POLL_S)
    while not stop.is_set() and not _answers(deployment.url + "readyz"):
        stop.wait(_POLL_S)


def _application(deployment: Deployment) -> Any:
    """Returns Serve's status of the application."""
    return serve.status().applications[deployment.name]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _cause(text: str) -> MacerError:
    """Returns the error of ours that a traceback of Serve ends with, or a `ServingError` with its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        name, _, message = line.partition(": ")
        kind = getattr(errors, name.rpartition(".")[2], None) if "macer_serve.errors." in name else None
        if isinstance(kind, type) and issubclass(kind, MacerError) and kind is not errors.MissingFactsError:
            return kind(message)
    return ServingError(f"the server cannot start: {(lines or ['no reason is given'])[-1][:300]}")


def _watch(deployment: Deployment, stop: threading.Event) -> None:
    """Returns when `stop` is set. Raises `ServingError` if Ray is gone."""
    while not stop.wait(5):
        try:
            _application(deployment)
        except Exception as error:
            raise ServingError(f"the server has ended: {first_line(error)}") from error


def _drain(deployment: Deployment) -> None:
    """Returns when every ingress replica refuses new requests and has answered those in flight."""
    if not ray.is_initialized() or deployment.name not in serve.status().applications:
        return
    try:
        serve.get_app_handle(deployment.name).broadcast("drain").results()
    except Exception as error:  # an ingress that never came up has no requests
        logging.getLogger(__name__).info("the ingress cannot be drained: %s", first_line(error))
    serve.delete(deployment.name)  # meanwhile the proxies send what the ingress has written


def _end() -> None:
    """Ends the Ray instance with everything in it."""
    ray.shutdown()


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM or SIGINT sets; a second one ends the process at once."""
    told = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if told.is_set():
            os._exit(128 + number)  # Ray's processes end with this one
        told.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
