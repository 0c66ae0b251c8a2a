"""One server process for most tests: the real `serve run` of the shipped YAML, on a Ray instance of its own."""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from brightness import issuer
from PIL import Image
from torch import nn

from macer_serve import ray_cluster
from macer_serve.checkpoint import load_model, save_checkpoint
from macer_serve.issuing import Issuer
from macer_serve.serving.environment import BY_GRPC

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "tests" / "images").glob("*.png"))
START_S = 400  # a loaded machine compiles slowly

pytest.importorskip("ray")


def free_port() -> int:
    """Returns a TCP port on which nobody listens.

    It lies above the ports of Ray's workers and below the range from which Linux picks ports (32768 and above), so that
    another process hardly takes it before the server does.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := 20_000 + secrets.randbelow(12_000)))
            return port


class Server:
    """A running `serve run` or `macer serve`; `processes` are those of its Ray instance, known by their environment."""

    def __init__(
        self,
        config: dict[str, Any],
        issuer: Issuer,
        command: Sequence[str] = ("serve", "run", "--address", "local"),
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        # Ray's sockets lie here, and a socket's path holds 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
        issuer.save(self.folder / "issuer.key")
        self.port = port or free_port()
        config["http_options"]["port"] = self.port
        for application in config["applications"]:
            application["args"]["key_file"] = str(self.folder / "issuer.key")
        (self.folder / "smoothed.yaml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # so that `serve status` may ask, too
            **ray_cluster.ENVIRONMENT,
            "OMP_WAIT_POLICY": "PASSIVE",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            **(environment or {}),
        }
        self._log = (self.folder / "serve.log").open("wb")
        self._command = [self.command(command[0]), *command[1:], str(self.folder / "smoothed.yaml")]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @staticmethod
    def command(name: str) -> str:
        """The script of that name beside this Python."""
        return str(Path(sys.executable).with_name(name))

    def serve(self, command: str) -> str:
        """The output of `serve status` or `serve config` for this server."""
        dashboard = re.search(r"View the dashboard at \S*?(http://[\d.:]+)", self.log())
        assert dashboard, "the server's log names no dashboard"
        done = subprocess.run(
            [self.command("serve"), command, "--address", dashboard[1]],
            env={**self.environment, "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    def replica_logs(self) -> str:
        """What Serve's processes wrote to their log files."""
        logs = sorted((self.folder / "session_latest" / "logs" / "serve").glob("*.log"))
        return "\n".join(path.read_text(errors="replace") for path in logs)

    def log(self) -> str:
        """What the server has printed, workers' output included."""
        return (self.folder / "serve.log").read_text(errors="replace")

    def wait_until_ready(self) -> None:
        deadline, again = time.monotonic() + START_S, False
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=15).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
            if self._process.poll() is not None and ray_cluster.TOO_SLOW in self.log() and not again:
                again, self._process = True, self._start()  # as `macer serve` does itself
        pytest.fail(f"the server did not become ready:\n{self.log()[-4000:]}")

    def processes(self, title: str = "") -> list[int]:
        """Living processes of this server whose command line holds `title`, oldest first."""
        marker, found = f"RAY_TMPDIR={self.folder}\0".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                ours = marker in (entry / "environ").read_bytes() + b"\0"
                if ours and stat[0] != "Z" and title in (entry / "cmdline").read_text(errors="replace"):
                    found.append((int(stat[19]), int(entry.name)))  # by its start: numbers are used again
            except OSError:
                continue  # it has ended meanwhile, or belongs to someone else
        return [pid for _, pid in sorted(found)]

    def terminate(self) -> None:
        """Sends SIGTERM to the command, as a service manager or Ctrl-C in its shell would."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = START_S) -> int:
        """Returns the exit code of the command, once it has ended by itself."""
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """End every process, and check that none is left."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self._log.close()
        self.log_at_end = self.log()
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left, f"processes outlived the server: {left}\n{self.log_at_end[-2000:]}"


def shipped_config() -> dict[str, Any]:
    """`deployments/smoothed.yaml` as users start it."""
    return yaml.safe_load((ROOT / "deployments" / "smoothed.yaml").read_text())  # type: ignore[no-any-return]


@contextmanager
def running(config: dict[str, Any], *command: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server of the configuration, ready, for as long as the context lasts; `serve run` unless `command` is given."""
    server = Server(config, issuer(), *([command] if command else []), environment=environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, not the developer's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def quick_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint named `quick`: the bundled one with logits twice as large, and so the same classes."""
    config, network = load_model("bundled:cifar10")
    *_, head = (module for module in network.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2)
    folder = tmp_path_factory.mktemp("checkpoints") / "quick"
    save_checkpoint(network, replace(config, name="quick", quantization={}), folder)
    return folder


@pytest.fixture(scope="session")
def server(quick_checkpoint: Path) -> Iterator[Server]:
    """Two models: `cifar10` as shipped, and `quick`, on two replicas of torch, uncompiled and with fewer votes.

    Requests go between its processes as under `macer serve`. Under the other `serve run` of these tests they do not.
    """
    config = shipped_config()
    arguments = config["applications"][0]["args"]
    arguments["limits"] = {"concurrent": 8, "timeout_s": 150}
    arguments["models"]["cifar10"]["num_cpus"] = 0
    arguments["models"]["quick"] = {
        "checkpoint": str(quick_checkpoint),
        "n": 1000,
        "alpha": 0.01,
        "replicas": 2,
        "num_cpus": 0,
        "voter": {"engine": "torch", "workers": 1, "compile": False},
    }
    with running(config, environment=BY_GRPC) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    # Connections are not kept: a refused upload may end its connection, as HTTP allows.
    with httpx.Client(base_url=server.url, timeout=200, headers={"Connection": "close"}) as own:
        yield own


def calls_of(client: httpx.Client, model: str) -> int:
    """Returns the calls that were sent to the model's voters."""
    return client.get("/readyz").json()["models"][model]["calls"]  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def operator() -> Issuer:
    """The operator, whose key the server has."""
    return issuer()


@pytest.fixture(scope="session")
def images() -> list[bytes]:
    """CIFAR-10 test images as PNG files; the second is a ship."""
    return [path.read_bytes() for path in IMAGES]


@pytest.fixture(scope="session")
def grey() -> bytes:
    """A grey image of which the bundled model gives two classes half of the votes each, whatever the key."""
    file = BytesIO()
    Image.fromarray(np.full((32, 32, 3), 134, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def ship() -> Path:
    return next(path for path in IMAGES if "ship" in path.name)
