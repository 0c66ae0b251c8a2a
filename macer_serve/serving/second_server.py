"""The app builder's check that no second server shares the port, for deployments without the proxy's guard."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

from macer_serve.errors import ServingError
from macer_serve.serving.ports import require_alone

log = logging.getLogger("ray.serve")

_READ_S = 2.0  # until the driver has printed what its workers logged


def require_own_port() -> None:
    """Ends the driver and raises `ServingError` if another server listens on the port of this one.

    Serve calls the app builder after its proxy has bound the port, so that both servers would get requests. Serve
    repeats a builder that raises, hence the driver must end. Does nothing if Serve does not run.
    """
    import ray

    if not ray.is_initialized() or (port := _port()) is None:
        return
    try:
        require_alone(port)
    except ServingError as error:
        log.error("%s. This server ends", error)
        if (driver := _driver()) is not None:
            time.sleep(_READ_S)
            os.kill(driver, signal.SIGTERM)
        raise


def _port() -> int | None:
    """Returns the port of this Serve instance's proxies; None if Serve does not run."""
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        client: Any = _get_global_client()
    except RayServeException:
        return None
    return int(client.http_config.port)


def _driver() -> int | None:
    """Returns the process of `serve run` to which this task belongs; None if another program deploys."""
    import ray
    from ray._private.state import state as module

    state: Any = module

    job = ray.get_runtime_context().get_job_id()
    for entry in state.job_table():
        if entry["JobID"] == job and (pid := int(entry["DriverPid"])) != os.getpid():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                return None  # on another machine
            return pid if b"run" in command and any(part.endswith(b"serve") for part in command) else None
    return None
