"""The `macer serve` that a benchmark measures, its own or one that runs already, and the processes of either."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from macer_serve.issuing import Issuer
from macer_serve.serving.deployment import read_deployment
from macer_serve.serving.settings import ModelSettings

ROOT = Path(__file__).resolve().parent.parent
IMAGES = sorted((ROOT / "tests" / "images").glob("*.png"))
START_S = 300.0  # until a server must be ready: a busy machine compiles slowly
END_S = 90.0  # until a server that was told to stop must have ended

_REPLICA = re.compile(r"ray::ServeReplica:[^:]+:([\w-]+)")
_RAY = re.compile(r"ray::(\w+)")


@dataclass(frozen=True, slots=True)
class Server:
    """A server that was started from the YAML file `file`. Its Ray instance keeps its files in the folder of `file`."""

    file: Path
    model: str
    settings: ModelSettings
    url: str
    key_file: Path

    def get(self, path: str, timeout_s: float = 15.0) -> tuple[int, Any]:
        """Returns the status and the JSON document of a GET; the status is 0 if there is no answer."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=timeout_s) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, None
        except (OSError, ValueError):
            return 0, None

    def wait_until_ready(self, limit_s: float = START_S) -> float:
        """Returns the seconds until /readyz answered 200. Raises `SystemExit` after `limit_s`."""
        began = time.monotonic()
        while time.monotonic() - began < limit_s:
            if self.get("/readyz")[0] == 200:
                return time.monotonic() - began
            time.sleep(0.2)
        raise SystemExit(f"the server is not ready after {limit_s:.0f} s")

    def counted(self) -> int:
        """Returns the votes that the model's voter has computed since its start."""
        status, document = self.get("/readyz")
        if status != 200:
            raise SystemExit(f"/readyz answers {status}: votes cannot be read")
        return int(document["models"][self.model]["votes"])

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """Returns the living processes of this server's Ray instance with their roles, such as `voter-cifar10`.

        They are known by RAY_TMPDIR in their environment, so that no process of another server is among them.
        """
        return _processes_of(self.file.parent)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Returns the processes of a deployment's replicas, such as `ingress`, oldest first."""
        found = [process for role, process in self.processes() if role == deployment]
        return sorted(found, key=lambda process: process.create_time())


def _role(command: list[str]) -> str:
    """Returns what a process of a Ray instance does, by its command line."""
    line = " ".join(command)
    if replica := _REPLICA.match(line):
        return replica[1]
    if actor := _RAY.match(line):
        return actor[1]
    name = Path(command[0]).name if command else "?"
    if name.startswith("python"):
        name = next((Path(word).name for word in command[1:] if word.endswith(".py")), "python")
    return name


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which server is measured."""
    parser.add_argument("--running", type=Path, metavar="YAML", help="measure the server that was started of this file")
    parser.add_argument("--model", help="a model of that file (default: its first)")
    parser.add_argument("--checkpoint", help="the checkpoint of the own server (default: the shipped one)")
    parser.add_argument("--server-cpus", metavar="LIST", help="cores of the own server, as taskset names them")
    parser.add_argument("--generator-cpus", metavar="LIST", help="cores of the load generator")
    parser.add_argument("--out", type=Path, help="write what is printed to this file, too")
    parser.add_argument("--tiny", action="store_true", help="a run of seconds, which shows that the script works")


def pin_generator(cpus: str | None) -> None:
    """Confines this process to cores of a list such as `0,2-3`."""
    if cpus is not None:
        parts = [part.split("-") for part in cpus.split(",")]
        os.sched_setaffinity(0, {core for part in parts for core in range(int(part[0]), int(part[-1]) + 1)})


@contextlib.contextmanager
def measured(options: argparse.Namespace, changes: dict[str, Any] | None = None) -> Iterator[Server]:
    """Yields the server that the options name. An own server ends with the context.

    An own server is `macer serve` of deployments/smoothed.yaml, with `changes` to the arguments of its first model.
    """
    if options.checkpoint:
        changes = {"checkpoint": options.checkpoint, **(changes or {})}
    if options.running:
        yield described(options.running.resolve(), options.model)
        return
    # Ray's sockets lie below this folder, and the path of a socket holds 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="mb", dir="/tmp"))
    try:
        server = described(_configured(folder, changes or {}), options.model)
        pinned = ["taskset", "-c", options.server_cpus] if options.server_cpus else []
        with started([*pinned, str(Path(sys.executable).with_name("macer")), "serve", str(server.file)], folder):
            server.wait_until_ready()
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def described(file: Path, model: str | None) -> Server:
    """Returns the server of a YAML file, and the model that is measured (default: the first)."""
    deployment = read_deployment(file)
    name = model or next(iter(deployment.settings.models))
    if (key_file := deployment.settings.key_file) is None:
        raise SystemExit(f"{file} names no key_file: its certificates cannot be computed offline")
    return Server(file, name, deployment.settings.models[name], deployment.url.rstrip("/"), Path(key_file))


def _configured(folder: Path, changes: dict[str, Any]) -> Path:
    """Writes a key, and the shipped deployment with the changes, on a free port."""
    config = on_free_port(ROOT)
    arguments = config["applications"][0]["args"]
    arguments["key_file"] = str(folder / "issuer.key")
    next(iter(arguments["models"].values())).update(changes)
    Issuer.new().save(folder / "issuer.key")
    file = folder / "smoothed.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def on_free_port(source: Path) -> Any:
    """Returns the shipped deployment of the project in `source`, on a free port."""
    config = yaml.safe_load((source / "deployments" / "smoothed.yaml").read_text())
    config["http_options"]["port"] = free_port()
    return config


def free_port() -> int:
    """Returns a TCP port on which nobody listens.

    It lies above the ports of Ray's workers and below the range from which Linux picks ports (32768 and above), so that
    another process hardly takes it before the server does.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := 20_000 + secrets.randbelow(12_000)))
            return port


@contextlib.contextmanager
def started(
    command: list[str], folder: Path, cwd: Path = ROOT, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a running command that serves. Its Ray instance keeps its files in the folder, with the log `serve.log`.

    It ends with the context, and so does every process of its Ray instance.
    """
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
                **environment,
                "RAY_TMPDIR": str(folder),
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process, folder)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Stops the command, and then every process of its Ray instance that is left."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        print(f"the server did not end within {END_S:.0f} s of SIGTERM and is killed", file=sys.stderr)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while (left := _processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for _, one in left:
        with contextlib.suppress(psutil.Error):
            one.kill()


def _processes_of(folder: Path) -> list[tuple[str, psutil.Process]]:
    """Returns the living processes, with their roles, of the Ray instance that keeps its files in the folder."""
    marker, found = f"RAY_TMPDIR={folder}\0".encode(), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = Path("/proc", str(process.pid), "environ").read_bytes() + b"\0"
            if marker in environment and process.status() != psutil.STATUS_ZOMBIE:
                found.append((_role(process.cmdline()), process))
    return found
