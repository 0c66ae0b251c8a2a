"""Ray clusters for long work: starting or joining one, and what its machines have. Ray is imported only when called."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macer_serve.errors import ClusterError, ParameterError, first_line

# Ray takes minutes to give up on an address that does not answer.
CONNECT_S = 5.0
START_S = 120.0  # for a node that Ray starts here


@contextlib.contextmanager
def ray_cluster(address: str | None = None) -> Iterator[None]:
    """Joins the Ray cluster at `address`, or starts one on this machine that ends with the block.

    `address` is HOST:PORT of the cluster's head, or `auto` for the cluster that runs on this machine; None takes the
    environment's RAY_ADDRESS, if there is one. A program that has joined a cluster before stays in it. Raises
    `ClusterError` if Ray cannot start or the cluster does not answer.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default, 15, gives workers less of the CPU than others
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
        with patience():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # of many kinds: of the file system, of the network, of Ray itself
        what = "Ray cannot start here" if address == "local" else f"the Ray cluster at {address} cannot be joined"
        raise ClusterError(f"{what}: {first_line(error)}", settings=settings) from error
    try:
        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Lets `ray.init` within the block wait for a node of its own for `START_S`: Ray's 30 s are few on a busy machine.

    Ray offers no setting for it. It asks for the node until the time is over, and asks once more if that says no.
    """
    from ray._private import services as module

    services: Any = module
    get_node, ends = services.get_node, time.monotonic() + START_S

    @functools.wraps(get_node)
    def patiently(*arguments: Any) -> Any:
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError:  # the node has not registered yet
                if time.monotonic() > ends:
                    raise
                time.sleep(0.1)

    services.get_node = patiently
    try:
        yield
    finally:
        services.get_node = get_node


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
