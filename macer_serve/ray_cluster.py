"""Ray clusters for long work: starting or joining one, and what its machines have. Ray is imported only when called."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macer_serve.errors import ClusterError, ParameterError, first_line

log = logging.getLogger(__name__)

TOO_SLOW = "timed out during startup"  # part of Ray's message if its start took too long

# Ray takes minutes to give up on an address that does not answer.
CONNECT_S = 5.0

# Settings that Ray reads from the environment of the process that starts it.
ENVIRONMENT = {
    "RAY_gcs_server_port_wait_time_s": "120",  # Ray's 30 s are few on a busy machine
    "RAY_worker_niceness": "0",  # Ray's 15 would leave its workers behind every other program
}


@contextlib.contextmanager
def ray_cluster(address: str | None = None) -> Iterator[None]:
    """Joins the Ray cluster at `address`, or starts one on this machine that ends with the block.

    `address` is HOST:PORT of the cluster's head, or `auto` for the cluster that runs on this machine; None takes the
    environment's RAY_ADDRESS, if there is one. A program that has joined a cluster before stays in it. Raises
    `ClusterError` if Ray cannot start or the cluster does not answer.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    settings = ("address",) if address else ()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address not in ("local", "auto"):
            _require_answer(address)
        start_ray(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # of many kinds: of the file system, of the network, of Ray itself
        what = "Ray cannot start here" if address == "local" else f"the Ray cluster at {address} cannot be joined"
        raise ClusterError(f"{what}: {first_line(error)}", settings=settings) from error
    try:
        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def start_ray(**options: Any) -> None:
    """Calls `ray.init`; if the machine is too busy for Ray to start in time, once more. Raises as `ray.init` does.

    Ray's raylet starts agents, and ends itself if they are not ready within 15 s. `ray.init` then fails after 30 s. Ray
    has no setting for the 15 s (ray-project/ray#65983).
    """
    import ray

    try:
        ray.init(**options)
    except Exception as error:  # Ray raises no kind of its own here
        if TOO_SLOW not in str(error):
            raise
        log.warning("Ray was too slow to start on this busy machine, and is started once more")
        _end_what_started(error)
        ray.init(**options)


def _end_what_started(error: Exception) -> None:
    """Ends the processes of the node whose start raised the error. Nothing but the traceback knows them any more."""
    from ray._private.node import Node

    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False)


def _require_answer(address: str) -> None:
    """Raises `ValueError` for what is no address, and `OSError` unless something listens there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("an address is HOST:PORT of the cluster's head, such as 192.0.2.1:6379, or auto")
    socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


@dataclass(frozen=True, slots=True)
class Share:
    """What each worker gets: `cores`, and a GPU of its own if `gpu`. `cores` is at least 1."""

    cores: int
    gpu: bool

    def resources(self) -> dict[str, float]:
        """Returns what Ray reserves for the worker. Beside a GPU, cores are not reserved."""
        return {"GPU": 1} if self.gpu else {"CPU": self.cores}


def share_of(workers: int, *, device: str | None, cores: int | None = None) -> Share:
    """Returns what each of the workers gets of the cluster that this process has joined.

    `device` None takes GPUs if the cluster has any. `cores` None divides all cores. Raises `ParameterError` if the
    cluster has fewer GPUs or cores than workers: Ray would wait for them.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    found, gpus = [int(m.get("CPU", 0)) for m in machines], sum(int(m.get("GPU", 0)) for m in machines)
    gpu = device.startswith(("cuda", "tensorrt")) if device else gpus > 0
    if workers > (gpus if gpu else sum(found)):
        there = f"{gpus} GPUs" if gpu else f"{sum(found)} CPU cores"
        raise ParameterError(f"{workers} workers need one each, and the cluster has {there}", settings=("workers",))
    most = max(1, cores_each(found, workers))
    return Share(min(cores or most, most), gpu)


def cores_each(machines: list[int], workers: int) -> int:
    """Returns the most cores that each worker can have, 0 if some worker has none; `machines` are their cores."""
    fitting = (each for each in range(max(machines), 0, -1) if sum(cores // each for cores in machines) >= workers)
    return next(fitting, 0)


def absolute(checkpoint: str) -> str:
    """Returns the checkpoint's name as workers need it, which run in folders of their own."""
    return checkpoint if checkpoint.startswith("bundled:") else str(Path(checkpoint).expanduser().absolute())
