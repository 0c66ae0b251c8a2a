"""Claim: a server that is changed under load fails no request, and each answer is by the model and key that it names.

    python benchmarks/deploy_under_load.py                     # `macer serve`, 20 changes, each by SIGHUP
    python benchmarks/deploy_under_load.py --by deploy         # `serve run`, 20 changes, each by `serve deploy`
    python benchmarks/deploy_under_load.py --changes 4 --bundled

Changes of the tolerance, the checkpoint, the key and a limit take turns. By SIGHUP, the checkpoint's folder is
overwritten in place. Clients ask in closed loops, every fourth request is a stream. An answer passes if the key that it
names signed it, and if it equals, in every field, the certificate that the library computes for the image by the model,
plan and key that the answer names. A change has ended when the server shows it.

At the end SIGTERM meets the same load. Every request that was sent before must be answered with 200, or be refused with
503 because it had not reached the ingress.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from engine import machine
from onnx import TensorProto, helper, numpy_helper
from own_server import free_port

from macer_serve.checkpoint import GRAPH, load_config, write_checkpoint
from macer_serve.issuing import Issuer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions

ROOT = Path(__file__).resolve().parent.parent
IMAGES = sorted((ROOT / "tests" / "images").glob("*.png"))
KINDS = ("tolerance", "checkpoint", "key", "limit")
VALUES = {"tolerance": (0.1, 0.15), "limit": (0.05, 0.04)}
VOTER = {"engine": "onnx", "workers": 1, "batch": 64}


@dataclass
class State:
    """Which of its two values each kind of change has now."""

    folder: Path
    bundled: bool
    replicas: int
    by: str
    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def checkpoint(self, which: int) -> Path:
        return self.folder / f"model{which}"

    def key_file(self, which: int) -> Path:
        return self.folder / f"key{which}"

    def served(self) -> Path:
        """Returns the folder that the YAML names: one that is overwritten, or each checkpoint's own."""
        if self.by == "deploy":
            return self.checkpoint(self.now["checkpoint"])
        served = self.folder / "served"
        shutil.rmtree(served, ignore_errors=True)
        shutil.copytree(self.checkpoint(self.now["checkpoint"]), served)
        return served

    def document(self, port: int) -> dict[str, Any]:
        """Returns the YAML of the deployment as it is to be now."""
        document = yaml.safe_load((ROOT / "deployments" / "smoothed.yaml").read_text())
        document["http_options"]["port"] = port
        document["applications"][0]["args"] = {
            "models": {
                "cifar10": {
                    "checkpoint": str(self.served()),
                    "n0": 100,
                    "n": 4000,
                    "alpha": 0.01,
                    "tolerance": VALUES["tolerance"][self.now["tolerance"]],
                    "replicas": self.replicas,
                    "num_cpus": 0.5,
                    "voter": VOTER,
                }
            },
            "limits": {"alpha": VALUES["limit"][self.now["limit"]]},
            "key_file": str(self.key_file(self.now["key"])),
            "ingress_replicas": self.replicas,
        }
        return document

    async def shown(self, client: httpx.AsyncClient) -> bool:
        """Returns whether the server that answers now has all of the present values."""
        (model,) = (await client.get("/models")).json()
        keys = (await client.get("/.well-known/jwks.json")).json()["keys"]
        refusal = await client.post("/predict?alpha=0.4", content=b"x", headers={"content-type": "image/png"})
        return (
            model["digest"] == load_config(self.checkpoint(self.now["checkpoint"])).digest
            and model["plan"]["tolerance"] == VALUES["tolerance"][self.now["tolerance"]]
            and keys[0]["kid"] == Issuer.load(self.key_file(self.now["key"])).key_id
            and f" {VALUES['limit'][self.now['limit']]:g}," in refusal.text
        )


def write_models(state: State) -> None:
    """Writes two checkpoints and two keys."""
    for which in range(2):
        if state.bundled and which == 0:
            shutil.copytree(ROOT / "macer_serve" / "bundled" / "cifar10", state.checkpoint(which))
        else:
            config = replace(load_config("bundled:cifar10"), name="random", architecture="onnx", quantization={})
            write_checkpoint(config, {GRAPH: random_network(which)}, state.checkpoint(which))
        Issuer.new().save(state.key_file(which))


def random_network(seed: int) -> bytes:
    """Returns the graph of a convolution and a linear layer with random weights, for CIFAR-10's shapes."""
    generator = np.random.default_rng(seed)
    weights = {"k": (8, 3, 5, 5), "w": (10, 8 * 7 * 7), "b": (10,)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["pixels", "k"], ["convolved"], strides=[4, 4]),
            helper.make_node("Relu", ["convolved"], ["rectified"]),
            helper.make_node("Flatten", ["rectified"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1),
        ],
        "network",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [
            numpy_helper.from_array(generator.normal(0, 0.2, shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


class Server:
    """A running `macer serve` or `serve run`, and how it is changed."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.file, self.log = state.folder / "deployment.yaml", state.folder / "log"
        self.environment = {
            **os.environ,
            "RAY_TMPDIR": str(state.folder),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "XDG_CACHE_HOME": str(state.folder / "cache"),
        }
        self.write()
        command = ["macer", "serve"] if state.by == "sighup" else ["serve", "run", "--address", "local"]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name(command[0])), *command[1:], str(self.file)],
            cwd=ROOT,
            env=self.environment,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def write(self) -> None:
        self.file.write_text(yaml.safe_dump(self.state.document(self.port)))

    def change(self) -> None:
        """Has the server take up what the file says now."""
        self.write()
        if self.state.by == "sighup":
            self.process.send_signal(signal.SIGHUP)
            return
        dashboard = re.search(r"View the dashboard at \S*?(http://[\d.:]+)", self.log.read_text(errors="replace"))
        assert dashboard, "the log names no dashboard"
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(self.file), "--address", dashboard[1]]
        environment = {**self.environment, "RAY_AUTH_MODE": "token"}
        subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)


@contextlib.contextmanager
def running(state: State) -> Iterator[Server]:
    server = Server(state)
    try:
        began = time.monotonic()
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/readyz", timeout=10).status_code == 200:
                    break
            if server.process.poll() is not None or time.monotonic() - began > 300:
                raise SystemExit(f"the server does not start:\n{server.log.read_text()[-3000:]}")
            time.sleep(0.5)
        print(f"ready after {time.monotonic() - began:.1f} s", flush=True)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.process.pid, signal.SIGKILL)


@dataclass
class Load:
    """Closed loops of clients, and what they were answered."""

    url: str
    stopping: bool = False
    stopped_at: float = math.inf
    began: dict[int, float] = field(default_factory=dict)  # requests that are not answered yet
    answers: list[tuple[int, Path, dict[str, Any]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    refused: int = 0  # once the server is stopping
    seconds: list[float] = field(default_factory=list)
    asked: int = 0

    async def client(self) -> None:
        limits = httpx.Limits(max_keepalive_connections=1)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as client:
            while not self.stopping:
                await self.ask(client)

    async def ask(self, client: httpx.AsyncClient) -> None:
        self.asked += 1
        one = self.asked
        image, stream = IMAGES[one % len(IMAGES)], one % 4 == 0
        self.began[one] = time.monotonic()
        try:
            answer = await client.post(
                "/predict",
                params={"stream": "true"} if stream else {},
                content=image.read_bytes(),
                headers={"content-type": "image/png"},
            )
            if self.stopping and answer.status_code == 503:
                self.refused += 1
                return
            if answer.status_code != 200:
                raise ValueError(f"{answer.status_code} {answer.text[:200]}")
            document = _result(answer.text) if stream else answer.json()
        except (httpx.HTTPError, ValueError) as error:
            if not self.stopping:
                self.failures.append(f"request {one}: {type(error).__name__}: {error}")
            elif self.began[one] < self.stopped_at:
                self.failures.append(f"request {one} at the end: {type(error).__name__}: {error}")
        else:
            self.answers.append((one, image, document))
            self.seconds.append(time.monotonic() - self.began[one])
        finally:
            del self.began[one]


def _result(text: str) -> dict[str, Any]:
    """Returns the result of a stream. Raises `ValueError` if it ends without one."""
    for event in text.split("\n\n"):
        lines = event.splitlines()
        if "event: result" in lines:
            return json.loads("".join(line.removeprefix("data: ") for line in lines if line.startswith("data: ")))
    raise ValueError(f"the stream ended without a result: {text[-200:]!r}")


@contextlib.asynccontextmanager
async def load_of(url: str, clients: int) -> AsyncIterator[Load]:
    load = Load(url)
    tasks = [asyncio.create_task(load.client()) for _ in range(clients)]
    try:
        yield load
    finally:
        load.stopping = True
        await asyncio.gather(*tasks)


async def measure(state: State, server: Server, clients: int, changes: int) -> Load:
    """Changes the server under load, then ends it under load."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60, headers={"connection": "close"}) as watch:
        async with load_of(server.url, clients) as load:
            await asyncio.sleep(2)
            for number in range(changes):
                kind = KINDS[number % len(KINDS)]
                state.now[kind] ^= 1
                answered, began = len(load.answers), time.monotonic()
                await asyncio.to_thread(server.change)
                shown = 0
                while shown < 3 and time.monotonic() - began < 240:  # replicas may differ for a moment
                    shown = shown + 1 if await state.shown(watch) else 0
                    await asyncio.sleep(0.2)
                took = time.monotonic() - began
                during = len(load.answers) - answered
                print(
                    f"change {number + 1:2} {kind:10} shown after {took:5.1f} s, {during:5} answers meanwhile, "
                    f"{len(load.failures)} failures so far",
                    flush=True,
                )
                if shown < 3:
                    load.failures.append(f"change {number + 1} was not shown")
                    break
                await asyncio.sleep(1)
            if state.by == "sighup":
                load.stopped_at = time.monotonic()
                load.stopping = True
                in_flight = len(load.began)
                server.process.send_signal(signal.SIGTERM)
        if state.by == "sighup":
            code = await asyncio.to_thread(server.process.wait, 120)
            took = time.monotonic() - load.stopped_at
            print(f"SIGTERM with {in_flight} requests in flight: ended with {code} after {took:.1f} s", flush=True)
    return load


def verify(state: State, load: Load) -> list[str]:
    """Returns what is wrong with the answers. Prints how many there are by each model, key and tolerance."""
    options = VoterOptions(**VOTER)
    issuers = {issuer.key_id: issuer for issuer in (Issuer.load(state.key_file(which)) for which in range(2))}
    models = {load_config(state.checkpoint(which)).digest: state.checkpoint(which) for which in range(2)}
    loaded = {digest: SmoothedClassifier.load(folder, options=options) for digest, folder in models.items()}
    expected: dict[tuple[Any, ...], dict[str, Any]] = {}
    counts: collections.Counter[tuple[str, str, float]] = collections.Counter()
    wrong = []
    for number, image, answer in load.answers:
        given = answer["certificate"]
        digest, key, tolerance = given["model"]["digest"], given["key_id"], given["plan"]["tolerance"]
        counts[digest[7:13], key[:6], tolerance] += 1
        if digest not in models or key not in issuers:
            wrong.append(f"answer {number} names model {digest}, key {key}")
            continue
        named = (image, digest, key, tolerance)
        if named not in expected:
            plan = Plan(n0=100, n=4000, alpha=0.01, tolerance=tolerance)
            smoothed = SmoothedClassifier(loaded[digest].config, voter=loaded[digest].voter, issuer=issuers[key])
            expected[named] = smoothed.certify(str(image), plan).to_json()
            expected[named]["model"]["name"] = "cifar10"
        if given != expected[named]:
            fields = [name for name in given if given[name] != expected[named].get(name)]
            wrong.append(f"answer {number} is not that of the model and key that it names: {', '.join(fields)}")
        issuers[key].keys.open(answer["certificate_jws"])
    for (digest, key, tolerance), count in sorted(counts.items()):
        print(f"model {digest} key {key} tolerance {tolerance}: {count} answers")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=("sighup", "deploy"), default="sighup")
    parser.add_argument("--changes", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=1, help="Of the ingress and of the voter.")
    parser.add_argument("--bundled", action="store_true", help="The bundled checkpoint as one of the two.")
    options = parser.parse_args()
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="md", dir="/tmp"))
    state = State(folder, options.bundled, options.replicas, options.by)
    try:
        write_models(state)
        with running(state) as server:
            load = asyncio.run(measure(state, server, options.clients, options.changes))
            if state.by == "sighup":
                print(server.log.read_text(errors="replace").replace(str(folder), "FOLDER").rstrip())
        wrong = verify(state, load)
        seconds = sorted(load.seconds)
        print(
            f"{len(load.answers)} answers, {len(load.failures)} failures, {len(wrong)} wrong, {load.refused} refused "
            f"after the signal; seconds per answer: median {seconds[len(seconds) // 2]:.2f}, "
            f"99 % {seconds[int(0.99 * len(seconds))]:.2f}, longest {seconds[-1]:.2f}"
        )
        if load.failures or wrong:
            raise SystemExit("\n".join((load.failures + wrong)[:20]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
