"""The ports of a server: who listens on one, and where those of Ray Serve listen."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macer_serve.errors import ServingError

log = logging.getLogger("ray.serve")

_LISTENING = "0A"  # the state of a socket in /proc/net/tcp


@dataclass(frozen=True, slots=True)
class Process:
    """A running process, by its id, its parent's and its command line."""

    pid: int
    parent: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


def process(pid: int) -> Process:
    """Returns the process of that id. Raises `OSError` if it has ended or cannot be seen."""
    entry = Path("/proc", str(pid))
    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(pid, int((entry / "stat").read_text().rpartition(")")[2].split()[1]), command[:200])


def listeners(port: int) -> list[Process]:
    """Returns the processes that listen on a TCP port of this machine, as far as /proc shows them to this user.

    Returns nothing on systems without /proc.
    """
    sockets = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = Path("/proc/net", table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, *rest = row.split()
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{rest[5]}]")
    return list(_holders(sockets)) if sockets else []


def _holders(sockets: set[str]) -> Iterator[Process]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(file) in sockets for file in (entry / "fd").iterdir()):
                yield process(int(entry.name))
        except OSError:
            continue  # the process has ended meanwhile, or is another user's


def require_free(host: str, port: int) -> None:
    """Raises `ServingError` if the address cannot be listened on. Binds it once to see, and lets it go."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do no harm
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _taken(port, listeners(port)) from error
            raise ServingError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def require_alone(port: int) -> None:
    """Raises `ServingError` if a process of another Ray instance listens on the port. To be called in a Ray worker.

    All workers of one Ray instance on a machine have one parent, its raylet.
    """
    if others := [listener for listener in listeners(port) if listener.parent != os.getppid()]:
        raise _taken(port, others)


def _taken(port: int, by: list[Process]) -> ServingError:
    who = " and ".join(str(_starter(one)) for one in by) or "another user's process"
    return ServingError(
        f"port {port} is taken by {who}. Stop that server, or choose another port under http_options in the YAML"
    )


def _starter(worker: Process) -> Process:
    """Returns the process that started the worker's Ray instance. Of any other process, returns that process."""
    try:
        if worker.command.startswith("ray::") and (starter := process(process(worker.parent).parent)).pid > 1:
            return starter
    except OSError:
        pass
    return worker


class _ExclusiveSocket(socket.socket):
    """A socket whose `bind` says who has the port."""

    __slots__ = ()

    def bind(self, address: Any) -> None:
        try:
            super().bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise OSError(errno.EADDRINUSE, str(_taken(address[1], listeners(address[1])))) from error


def guard_proxy() -> list[Any]:
    """Makes Serve's HTTP proxy bind its port for itself alone, limits its connections, and returns its middlewares.

    Serve's proxies share ports (SO_REUSEPORT), so that two servers on one port would each get some of the requests and
    answer them with noise of two keys. Serve calls this function in the proxy's process before the proxy binds its
    port, if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.
    """
    from ray.serve._private import http_util as module

    from macer_serve.serving.proxy import limit_connections, middlewares

    def exclusive(sock: socket.socket) -> bool:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so that a proxy can be restarted
        sock.__class__ = _ExclusiveSocket
        return True

    # Only what that module calls can be replaced: Ray sends the proxy's own code to its process by value.
    http_util: Any = module
    http_util.set_socket_reuse_port = exclusive
    limit_connections()
    return middlewares()


def keep_to_loopback() -> None:
    """Makes the gRPC port of this Serve replica listen on 127.0.0.1. To be called in the replica's constructor.

    Serve opens the port on every address. In a cluster of several machines that sends requests by gRPC, other machines
    need it, and it stays as it is.
    """
    import ray
    from ray.serve._private import constants
    from ray.serve._private import replica as module

    replica: Any = module

    by_grpc = constants.RAY_SERVE_USE_GRPC_BY_DEFAULT or constants.RAY_SERVE_PROXY_USE_GRPC
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if by_grpc and here != "127.0.0.1":
        return
    add_port = replica.add_port_to_grpc_server

    @functools.wraps(add_port)
    def on_loopback(server: Any, address: str) -> Any:
        return add_port(server, re.sub(r"^\[::\]", "127.0.0.1", address))

    replica.add_port_to_grpc_server = on_loopback


def bound_host() -> str:
    """Returns the host on which the proxies of this Serve instance listen. To be called in a replica."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return str(client.http_config.host)


def metrics_addresses() -> list[str]:
    """Returns the addresses at which the nodes of this Ray cluster serve metrics in Prometheus' format."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
