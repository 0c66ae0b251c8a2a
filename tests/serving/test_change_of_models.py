"""A server that is changed: no request fails, and each answer is by the model and key that it names."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import yaml
from brightness import issuer
from importing.foreign_files import linear_model
from ray.serve._private.common import ReplicaState
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview
from serving.conftest import IMAGES, Server, running, shipped_config

from macer_serve.checkpoint import GRAPH, CheckpointConfig, write_checkpoint
from macer_serve.errors import CheckpointError, IssuerKeyError, MacerError
from macer_serve.issuing import Issuer
from macer_serve.serving.app import check
from macer_serve.serving.changes import room_for, settled
from macer_serve.serving.rollout import _must_wait
from macer_serve.serving.settings import AppSettings
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions

QUICK = {"engine": "onnx", "workers": 1, "batch": 64}
CONFIG = CheckpointConfig(
    name="small", architecture="onnx", classes=("a", "b", "c"), input_shape=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3,
    sigma=0.25, resize=8, files={GRAPH: "sha256:" + 64 * "0"},
)  # fmt: skip
CLIENTS = 6
TOLERANCES = (0.1, 0.15)


def linear(weights: npt.NDArray[np.float64]) -> bytes:
    """Returns the graph of a linear network, as checkpoints hold it."""
    model = linear_model(weights, np.zeros(len(weights)))
    model.graph.input[0].name, model.graph.output[0].name = "pixels", "logits"
    model.graph.node[0].input[0], model.graph.node[-1].output[0] = "pixels", "logits"
    return model.SerializeToString()  # type: ignore[no-any-return]


@dataclass
class Operator:
    """The files of an operator: two checkpoints, two keys, and the folder, key and YAML that are served."""

    folder: Path
    classifiers: dict[str, SmoothedClassifier] = field(default_factory=dict)  # by digest
    issuers: dict[str, Issuer] = field(default_factory=dict)  # by key

    def __post_init__(self) -> None:
        for which in range(2):
            weights = np.random.default_rng(which).normal(size=(3, 3, 8, 8))
            folder = self.folder / f"model{which}"
            config = write_checkpoint(CONFIG, {GRAPH: linear(weights)}, folder)
            self.classifiers[config.digest] = SmoothedClassifier.load(folder, options=VoterOptions(**QUICK))
            new = issuer() if which == 0 else Issuer.new()
            new.save(self.folder / f"key{which}")
            self.issuers[new.key_id] = new
        self.put_model(0)

    def put_model(self, which: int) -> None:
        """Overwrites the served folder in place, file by file."""
        shutil.copytree(self.folder / f"model{which}", self.folder / "served", dirs_exist_ok=True)

    def config(self, *, tolerance: float = TOLERANCES[0], key: int = 0, alpha: float = 0.05) -> dict[str, Any]:
        config = shipped_config()
        model = {"checkpoint": str(self.folder / "served"), "n": 4000, "alpha": 0.01, "tolerance": tolerance}
        config["applications"][0]["args"] = {
            "models": {"small": model | {"num_cpus": 0.1, "voter": QUICK}},
            "limits": {"alpha": alpha},
            "key_file": str(self.folder / f"key{key}"),
            "ingress_replicas": 2,
        }
        return config

    def expected(self, image: bytes, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the certificate of an image by the model, key and plan that a certificate names."""
        made = self.classifiers[given["model"]["digest"]]
        named = SmoothedClassifier(made.config, voter=made.voter, issuer=self.issuers[given["key_id"]])
        plan = Plan(n0=100, n=4000, alpha=0.01, tolerance=given["plan"]["tolerance"])
        return named.certify(image, plan).to_json()


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Operator:
    return Operator(tmp_path_factory.mktemp("operator"))


@pytest.fixture(scope="module")
def served(operator: Operator) -> Iterator[Server]:
    with running(operator.config(), "macer", "serve") as server:
        deadline = time.monotonic() + 60
        while "ready: " not in server.log() and time.monotonic() < deadline:  # /readyz answers a moment before
            time.sleep(0.1)
        yield server


def write(server: Server, config: dict[str, Any]) -> None:
    """Writes the YAML that the server reads, with its port."""
    config["http_options"]["port"] = server.port
    (server.folder / "smoothed.yaml").write_text(yaml.safe_dump(config))


def hang_up(server: Server) -> str:
    """Returns the line with which the server answers SIGHUP."""
    before = len(server.log().splitlines())
    server._process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 240
    while len(lines := server.log().splitlines()) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    (line,) = lines[before:]
    return line


def ask(url: str, image: bytes, *, stream: bool = False) -> httpx.Response:
    query = {"stream": "true"} if stream else {}
    return httpx.post(f"{url}/predict", params=query, content=image, headers={"content-type": "image/png"}, timeout=200)


@contextmanager
def under_load(url: str, ended: threading.Event) -> Iterator[list[Future[list[tuple[bytes, httpx.Response]]]]]:
    """Asks from several threads, every third request for a stream, until `ended` is set. Yields what they get."""

    def client(number: int) -> list[tuple[bytes, httpx.Response]]:
        got = []
        while not ended.is_set():
            image = IMAGES[(number + len(got)) % len(IMAGES)].read_bytes()
            got.append((image, ask(url, image, stream=number % 3 == 0)))
        return got

    with ThreadPoolExecutor(CLIENTS) as threads:
        try:
            yield [threads.submit(client, number) for number in range(CLIENTS)]
        finally:
            ended.set()


def test_changes_under_load_fail_no_request(operator: Operator, served: Server) -> None:
    """Tolerance, checkpoint in place, key and limit. All answers are compared with those of the library."""
    ended = threading.Event()
    with under_load(served.url, ended) as clients:
        operator.put_model(1)
        write(served, operator.config(tolerance=TOLERANCES[1]))
        first = hang_up(served)
        write(served, operator.config(tolerance=TOLERANCES[1], key=1, alpha=0.04))
        second = hang_up(served)
        ended.set()
        answers = [one for client in clients for one in client.result()]
    assert first == second == "changed: the new deployment answers"
    assert {answer.status_code for _, answer in answers} == {200}
    seen, expected = set(), {}
    for image, answer in answers:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert "event: result\n" in answer.text
            continue
        given = answer.json()["certificate"]
        named = (given["model"]["digest"], given["key_id"], given["plan"]["tolerance"])
        seen.add(named)
        if (*named, image) not in expected:
            expected[*named, image] = operator.expected(image, given)
        assert given == expected[*named, image]
        operator.issuers[given["key_id"]].keys.open(answer.json()["certificate_jws"])
    digests, keys = list(operator.classifiers), list(operator.issuers)
    assert seen == {
        (digests[0], keys[0], TOLERANCES[0]),
        (digests[1], keys[0], TOLERANCES[1]),
        (digests[1], keys[1], TOLERANCES[1]),
    }
    refused = httpx.post(f"{served.url}/predict?alpha=0.045", content=IMAGES[0].read_bytes(), timeout=60)
    assert "must not exceed this server's 0.04" in refused.text


def test_a_faulty_change_is_refused_in_one_line_and_the_server_goes_on(operator: Operator, served: Server) -> None:
    good = (served.folder / "smoothed.yaml").read_text()
    before = ask(served.url, IMAGES[0].read_bytes()).json()["certificate"]
    faulty = operator.config(tolerance=-1)
    write(served, faulty)
    assert "applications.0.args.models.small.tolerance: " in hang_up(served)
    faulty = operator.config()
    faulty["http_options"]["host"] = "0.0.0.0"
    write(served, faulty)
    assert hang_up(served) == (
        "not changed: http_options cannot change while the server runs: end it, and start it again"
    )
    faulty = operator.config()
    faulty["applications"][0]["args"]["models"]["small"]["voter"] = {"engine": "onnx", "device": "cuda"}
    write(served, faulty)
    assert hang_up(served).startswith("not changed: ")  # only a voter finds that out
    (served.folder / "smoothed.yaml").write_text(good)
    assert hang_up(served) == "not changed: the deployment and the files that it names are as before"
    assert ask(served.url, IMAGES[0].read_bytes()).json()["certificate"] == before


def test_a_folder_that_is_overwritten_does_not_change_what_is_served(operator: Operator, served: Server) -> None:
    """Not even for voters that are started afterwards."""
    before = ask(served.url, IMAGES[0].read_bytes()).json()["certificate"]
    (operator.folder / "served" / "config.json").write_text("{}")
    voters = served.processes("ray::ServeReplica:macer:voter-small")
    for pid in voters:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        new = set(served.processes("ray::ServeReplica:macer:voter-small")) - set(voters)
        if new and httpx.get(f"{served.url}/readyz", timeout=60).status_code == 200:
            break
        time.sleep(0.2)
    assert ask(served.url, IMAGES[0].read_bytes()).json()["certificate"] == before


def test_the_settings_of_a_change_name_what_the_files_hold(operator: Operator, tmp_path: Path) -> None:
    operator.put_model(0)
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(operator.config()))
    first = settled(file, tmp_path / "unused").settings
    operator.put_model(1)
    second = settled(file, tmp_path / "unused").settings
    assert [one.models["small"].digest for one in (first, second)] == list(operator.classifiers)
    assert first.key_id == next(iter(operator.issuers))
    assert not (tmp_path / "unused").exists()
    config = operator.config()
    del config["applications"][0]["args"]["key_file"]
    file.write_text(yaml.safe_dump(config))
    keys = {settled(file, tmp_path / "own").settings.key_id for _ in range(2)}
    assert keys == {Issuer.load(tmp_path / "own").key_id}  # one key for all changes of one start


@pytest.mark.parametrize(
    ("wrong", "kind"), [({"digest": "sha256:" + 64 * "0"}, CheckpointError), ({"key_id": "other"}, IssuerKeyError)]
)
def test_files_of_another_digest_or_key_are_refused(
    wrong: dict[str, str], kind: type[MacerError], operator: Operator
) -> None:
    arguments = operator.config()["applications"][0]["args"]
    (arguments if "key_id" in wrong else arguments["models"]["small"]).update(wrong)
    with pytest.raises(kind, match="deploy again"):
        check(AppSettings.model_validate(arguments))


def test_ray_starts_with_room_for_twice_the_voters(operator: Operator) -> None:
    arguments = operator.config()["applications"][0]["args"]
    arguments["models"]["small"] |= {"replicas": 300, "num_cpus": 2}
    assert room_for(AppSettings.model_validate(arguments)) == 1200


@pytest.mark.parametrize(
    ("ingresses", "voters", "waits"),
    [
        ({ReplicaState.STARTING: 1}, "UPDATING", False),  # a first start
        ({ReplicaState.STARTING: 1, ReplicaState.RUNNING: 1}, "UPDATING", True),
        ({ReplicaState.STARTING: 1, ReplicaState.RUNNING: 1}, "HEALTHY", False),
        ({ReplicaState.STARTING: 1, ReplicaState.RUNNING: 1}, "UNHEALTHY", False),  # a voter was lost, nothing changes
    ],
)
def test_an_ingress_waits_for_voters_only_while_another_one_serves(
    ingresses: dict[ReplicaState, int], voters: str, waits: bool
) -> None:
    def overview(status: str, states: dict[ReplicaState, int]) -> DeploymentStatusOverview:
        return DeploymentStatusOverview(status=status, status_trigger="UNSPECIFIED", replica_states=states, message="")

    deployments = {"ingress": overview("UPDATING", ingresses), "voter-small": overview(voters, {})}
    status = ApplicationStatusOverview(
        status="DEPLOYING", message="", last_deployed_time_s=0.0, deployments=deployments
    )
    assert _must_wait(status, "ingress", ["small"]) is waits
