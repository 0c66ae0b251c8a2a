"""`macer serve` as a process: what it refuses, where it listens, and that no request is lost at its end."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import httpx
import psutil
import pytest
import ray
import yaml
from brightness import issuer
from click.testing import CliRunner
from serving.conftest import ROOT, Server, free_port, running, shipped_config

from macer_serve.cli import main
from macer_serve.serving.deployment import BUNDLED, IMPORT_PATH, read_deployment
from macer_serve.serving.ports import listeners

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
MACER = ("macer", "serve")


def listening(pid: int) -> list[str]:
    """Returns the addresses on which a process listens."""
    connections = psutil.Process(pid).net_connections("tcp")
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]


def light_config(**changes: Any) -> dict[str, Any]:
    """Returns the shipped deployment, its voter without a CPU of its own."""
    config = shipped_config()
    arguments = config["applications"][0]["args"]
    arguments["models"]["cifar10"] |= {"num_cpus": 0, "voter": {"workers": 1}}
    arguments |= changes
    return config


Change = Callable[[dict[str, Any], Path], object]


def arguments(config: dict[str, Any]) -> Any:
    return config["applications"][0]["args"]


def model(config: dict[str, Any]) -> Any:
    return arguments(config)["models"]["cifar10"]


def damaged(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint one of whose files was cut short in copying."""
    bundled = Path(ROOT, "macer_serve", "bundled", "cifar10")
    copy = folder / "copy"
    copy.mkdir()
    for file in bundled.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    model(config)["checkpoint"] = str(copy)


def renamed(config: dict[str, Any], folder: Path) -> None:
    """The same weights under another name, as a second model."""
    bundled = Path(ROOT, "macer_serve", "bundled", "cifar10")
    copy = folder / "copy"
    copy.mkdir()
    for file in bundled.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / "config.json").read_text().replace('"name": "', '"name": "another ')
    (copy / "config.json").write_text(text)
    arguments(config)["models"]["other"] = {"checkpoint": str(copy)}


WRONG: dict[str, tuple[Change, int, str]] = {
    "no such checkpoint": (
        lambda c, f: model(c).update(checkpoint=str(f / "nowhere")),
        3,
        "nowhere is not a checkpoint",
    ),
    "no such bundled one": (lambda c, f: model(c).update(checkpoint="bundled:x"), 3, "bundled:cifar10"),
    "damaged": (damaged, 3, "is not the file this checkpoint was saved with"),
    "unknown setting": (lambda c, f: model(c).update(sigma=1), 2, "applications.0.args.models.cifar10.sigma: "),
    "n of nothing": (lambda c, f: model(c).update(n=0), 2, "models.cifar10.n: "),
    "two plans": (lambda c, f: model(c).update(radius=1), 2, "two plans: give one of them"),
    "no models": (lambda c, f: arguments(c).update(models={}), 2, "at least one checkpoint"),
    "no arguments": (lambda c, f: c["applications"][0].pop("args"), 2, "args.models"),
    "one model twice": (renamed, 2, "models cifar10 and other are one model"),
    "no such key": (lambda c, f: arguments(c).update(key_file=str(f / "no")), 17, "No such file or directory"),
    "no application": (lambda c, f: c.update(applications=[]), 2, IMPORT_PATH),
    "foreign application": (lambda c, f: c["applications"][0].update(import_path="a.b:c"), 2, "'serve run'"),
    "port of text": (lambda c, f: c["http_options"].update(port="x"), 2, "http_options.port: "),
    "address of another": (lambda c, f: c["http_options"].update(host="192.0.2.77"), 9, "cannot listen on 192.0.2.77:"),
    "bad origin": (lambda c, f: arguments(c).update(cors_origins=["example.org"]), 2, "args.cors_origins.0: "),
}


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray may not start, and the environment is as before."""

    def started(*args: Any, **options: Any) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    with mock.patch.dict(os.environ):
        yield


def refusal(file: Path) -> tuple[int, str]:
    """Returns the exit code and the one line with which `macer serve` refuses a file."""
    done = CliRunner().invoke(main, ["serve", str(file)])
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return done.exit_code, line


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_before_ray_starts(case: str, tmp_path: Path) -> None:
    change, code, says = WRONG[case]
    config = light_config()
    config["http_options"]["port"] = free_port()
    change(config, tmp_path)
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(config))
    exit_code, line = refusal(file)
    assert exit_code == code, line
    assert line.startswith("macer: ")
    assert says in line


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("text", "says"), [("a: [", "not YAML"), ("- a", "a deployment is a mapping"), ("", "a deployment is a mapping")]
)
def test_a_file_that_is_no_deployment_is_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_text(text)
    exit_code, line = refusal(file)
    assert (exit_code, says in line) == (2, True), line
    exit_code, line = refusal(tmp_path / "nowhere.yaml")
    assert (exit_code, "No such file or directory" in line) == (2, True), line


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("reuse", [False, True])
def test_a_taken_port_is_refused_before_ray_starts(reuse: bool, tmp_path: Path) -> None:
    """Also one that another process would share."""
    with socket.socket() as taken:
        if reuse:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = light_config()
        config["http_options"]["port"] = port
        file = tmp_path / "deployment.yaml"
        file.write_text(yaml.safe_dump(config))
        exit_code, line = refusal(file)
        assert [one.pid for one in listeners(port)] == [os.getpid()]
    assert exit_code == 9
    assert f"port {port} is taken by process {os.getpid()} (" in line
    assert not listeners(port)


def test_the_bundled_deployment_is_the_shipped_one() -> None:
    assert (ROOT / "deployments" / "smoothed.yaml").read_bytes() == BUNDLED.read_bytes()
    deployment = read_deployment()
    assert (deployment.url, deployment.name) == ("http://127.0.0.1:8000/", "macer")
    printed = CliRunner().invoke(main, ["serve", "--print"])
    assert printed.stdout == BUNDLED.read_text()


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    """A `macer serve` of the shipped model."""
    with running(light_config(), *MACER) as server:
        yield server


def test_it_says_that_it_is_ready_and_nothing_else(served: Server) -> None:
    deadline = time.monotonic() + 60  # /readyz answers a moment before the line is printed
    while not served.log() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert served.log() == f"ready: {served.url}/\n"


def test_every_port_is_on_the_address_that_was_configured(served: Server) -> None:
    addresses = {pid: listening(pid) for pid in served.processes()}
    assert sum(map(len, addresses.values())) > 5
    assert {address for found in addresses.values() for address in found} <= LOOPBACK


def test_replicas_take_requests_of_their_own_server_alone(served: Server) -> None:
    """Requests between them are pickled, so that who may send one may run code."""
    refused = []
    replicas = served.processes("ray::ServeReplica")
    for pid in replicas:
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                with grpc.insecure_channel(f"127.0.0.1:{connection.laddr.port}") as channel:
                    call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
                    with pytest.raises(grpc.RpcError) as caught:
                        call(b"", timeout=30)
                    refused.append(caught.value.code())
    assert refused.count(grpc.StatusCode.UNAUTHENTICATED) == len(replicas) == 2
    assert set(refused) == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}  # Ray's own port


def log_of_second(config: dict[str, Any], port: int) -> str:
    """Returns what a `serve run` on a port that is taken has printed, once it has ended by itself."""
    for _ in range(3):
        second = Server(config, issuer(), port=port)
        try:
            assert second.wait() != 0
        finally:
            second.stop()
            log = second.log_at_end
        if "timed out during startup" not in log:  # Ray gives a busy machine 30 s, whatever is configured
            return log
    pytest.fail(f"Ray does not start on this machine:\n{log[-2000:]}")


def test_a_second_server_names_the_first_and_takes_no_request_from_it(served: Server, tmp_path: Path) -> None:
    """By `macer serve`, and by `serve run` with the shipped YAML."""
    file = tmp_path / "second.yaml"
    config = light_config()
    config["http_options"]["port"] = served.port
    file.write_text(yaml.safe_dump(config))
    command = [Server.command("macer"), "serve", str(file)]
    environment = {**served.environment, "RAY_TMPDIR": str(tmp_path)}
    driver = served.processes("macer")[0]
    named = f"port {served.port} is taken by process {driver} ("
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 9, done.stderr
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1

    lost: list[str] = []
    ended = threading.Event()

    def ask() -> int:
        asked = 0
        while not ended.is_set():
            try:
                answer = httpx.get(f"{served.url}/healthz", timeout=60)  # a connection of its own
                if answer.status_code != 200:
                    lost.append(f"{answer.status_code} {answer.text}")
            except httpx.TransportError as error:
                lost.append(repr(error))
            asked += 1
            ended.wait(0.05)
        return asked

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            assert named in log_of_second(light_config(), served.port)
        finally:
            ended.set()
        assert sum(future.result() for future in asking) > 20
    assert not lost

    assert httpx.get(f"{served.url}/readyz", timeout=60).status_code == 200


def test_a_port_that_is_shared_already_is_noticed_by_the_application() -> None:
    """Neither side has the proxy's guard: the app builder names the other process and ends its own `serve run`."""
    unguarded = light_config()
    del unguarded["controller_options"]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} is taken by process {os.getpid()} (" in log_of_second(unguarded, port)


def test_a_voter_that_cannot_start_ends_it_with_one_line() -> None:
    config = light_config()
    model(config)["voter"] = {"device": "cuda", "engine": "onnx"}
    server = Server(config, issuer(), MACER)
    try:
        assert server.wait() == 7
        (line,) = server.log().splitlines()
        assert line.startswith("macer: ")
        assert "cuda" in line or "onnx" in line
    finally:
        server.stop()


@pytest.mark.parametrize("replicas", [1, 2])
def test_requests_in_flight_are_answered_at_the_end(replicas: int, images: list[bytes]) -> None:
    config = light_config(limits={"timeout_s": 250})  # however slow the processor is, all eight are admitted
    config["applications"][0]["deployments"] = [{"name": "ingress", "num_replicas": replicas}]
    with running(config, *MACER) as server, ThreadPoolExecutor(8) as threads:
        assert len(server.processes("ray::ServeReplica:macer:ingress")) == replicas
        begun = threading.Barrier(9, timeout=250)

        def ask(image: bytes) -> str:
            query = {"tolerance": "1e-6", "n": "3000", "stream": "true"}
            headers = {"content-type": "image/png"}
            url, answered = f"{server.url}/predict", ""
            with httpx.stream("POST", url, params=query, content=image, headers=headers, timeout=300) as answer:
                assert answer.status_code == 200
                for text in answer.iter_text():
                    if not answered:
                        begun.wait()
                    answered += text
            return answered

        asked = [threads.submit(ask, image) for image in images[:8]]
        begun.wait()  # all are in the middle of their votes
        server.terminate()
        refused = None
        while refused is None and not all(future.done() for future in asked):
            answer = httpx.post(f"{server.url}/predict?n=1", files={"file": images[9]}, timeout=300)
            refused = None if answer.status_code == 200 else answer
        answers = [future.result() for future in asked]
        assert all("event: result\n" in answer and "event: error\n" not in answer for answer in answers)
        assert refused is not None
        assert (refused.status_code, refused.json()["title"]) == (503, "Server is shutting down")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.wait() == 0
