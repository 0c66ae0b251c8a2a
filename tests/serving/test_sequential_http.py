"""Plans, PREDICT and streams over HTTP: each event a certificate, all of them about the same votes."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest

from macer_serve.issuing import Issuer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan

PNG = {"content-type": "image/png"}
Event = tuple[str, dict[str, Any]]


def certify(client: httpx.Client, image: bytes, **parameters: Any) -> dict[str, Any]:
    answer = client.post("/predict", params=parameters, content=image, headers=PNG)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def events_of(client: httpx.Client, image: bytes, **parameters: Any) -> list[Event]:
    parameters["stream"] = "true"
    with client.stream("POST", "/predict", params=parameters, content=image, headers=PNG) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    found = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.parametrize(
    ("parameters", "stopped"),
    [
        ({"tolerance": 0.3}, "tolerance"),
        ({"radius": 0.1}, "radius"),
        ({"radius": 2.0, "coarse": False}, "futility"),
        ({"tolerance": 1e-6}, "cap"),
    ],
)
def test_the_run_stops_for_the_reason_asked_for(
    client: httpx.Client, images: list[bytes], grey: bytes, parameters: dict[str, Any], stopped: str
) -> None:
    split = stopped == "futility"  # a radius that few votes against the class put out of reach
    answer = certify(client, grey if split else images[1], **parameters)
    certificate = answer["certificate"]
    assert (answer["stopped"], certificate["bound"]) == (stopped, "mixture+clopper-pearson")
    if split:
        assert answer["reason"].startswith("a radius of 2 is out of reach, and 16 votes (")
    else:
        assert answer["label"] == "ship"
    assert sum(certificate["votes"]) == certificate["n"] <= 10_000
    assert (answer["radius"] >= parameters.get("radius", 0)) == (stopped != "futility")
    assert Plan.from_json(certificate["plan"]).kind == ("radius" if "radius" in parameters else "tolerance")


def test_plans_read_the_same_votes_further_or_less_far(client: httpx.Client, images: list[bytes]) -> None:
    near, far = (certify(client, images[0], radius=0.01, n=n)["certificate"] for n in (200, 10_000))
    assert near["selection_votes"] == far["selection_votes"]
    first, second = (certify(client, images[0], tolerance=1e-6, n=n)["certificate"] for n in (2000, 5000))
    assert (first["n"], second["n"]) == (2000, 5000)
    assert all(a <= b for a, b in zip(first["votes"], second["votes"], strict=True))


def test_the_last_event_of_a_stream_is_the_answer(client: httpx.Client, images: list[bytes], operator: Issuer) -> None:
    *states, (name, result) = events_of(client, images[1], tolerance=1e-6, n=3000)
    answer = certify(client, images[1], tolerance=1e-6, n=3000)
    assert name == "result"
    assert result["certificate"] == answer["certificate"]
    assert (
        operator.keys.open(result["certificate_jws"]).payload
        == Certificate.from_json(answer["certificate"]).canonical()
    )
    assert set(result) == set(answer)
    assert states
    assert {name for name, _ in states} == {"progress"}
    seen, shown = 0, 0.0
    for _, state in states:
        certificate = Certificate.from_json(state["certificate"])
        assert (certificate.key_id, certificate.seed_proof) == (operator.key_id, result["certificate"]["seed_proof"])
        assert (state["n"], state["radius"], state["label"]) == (certificate.n, certificate.radius, certificate.label)
        assert seen <= certificate.n < 3000
        assert shown <= state["radius"]  # it never shrinks
        seen, shown = certificate.n, state["radius"]
    assert any(state["radius"] > 0 for _, state in states), "a certificate on its own, long before the last vote"


def test_a_fixed_plan_streams_votes_and_proves_nothing_before_its_look(
    client: httpx.Client, images: list[bytes]
) -> None:
    *states, (name, result) = events_of(client, images[1], model="quick")
    assert (name, result["label"], result["stopped"]) == ("result", "ship", "n")
    assert all(state["abstained"] and state["radius"] == 0 for _, state in states)


def test_a_stream_of_a_mistake_is_a_problem_not_a_stream(client: httpx.Client, images: list[bytes]) -> None:
    for image, parameters, status in ((images[1], {"n": 0}, 422), (b"nonsense", {}, 400)):
        answer = client.post("/predict", params={**parameters, "stream": "true"}, content=image, headers=PNG)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_stream_ends_at_the_deadline_with_what_is_proved(client: httpx.Client, images: list[bytes]) -> None:
    name, result = events_of(client, images[1], tolerance=1e-6, n=100_000, timeout_s=1.5)[-1]
    assert (name, result["stopped"]) == ("result", "deadline")
    assert result["label"] == "ship"
    assert result["radius"] > 0, "an anytime-valid certificate, where a fixed plan would have nothing"


def test_streams_that_are_closed_give_back_their_places(server: Any, client: httpx.Client, images: list[bytes]) -> None:
    head = b"POST /predict?stream=true&tolerance=1e-6&n=100000 HTTP/1.1\r\nHost: localhost\r\n"
    body = f"Content-Length: {len(images[1])}\r\n\r\n".encode() + images[1]
    for after in (b"HTTP/1.1 200", b"event: progress"):
        for _ in range(12):  # more than the eight places
            with socket.create_connection(("127.0.0.1", server.port)) as leaving:
                leaving.settimeout(60)
                leaving.sendall(head + body)
                seen = b""
                while after not in seen and b" 429 " not in seen:
                    seen += leaving.recv(65536)
    deadline = time.monotonic() + 60
    while (status := client.post("/predict", content=images[1], headers=PNG).status_code) == 429:
        assert time.monotonic() < deadline, "the places of closed streams are still taken"
    assert status == 200


def test_predict_answers_the_class_alone(client: httpx.Client, images: list[bytes]) -> None:
    answer = certify(client, images[1], mode="predict")
    certificate = answer["certificate"]
    assert (answer["label"], answer["radius"], answer["upload_radius"]) == ("ship", 0, 0)
    assert (certificate["bound"], certificate["n0"], certificate["n"]) == ("binomial-test", 0, 1000)
    assert certificate["statement"] == (
        "With confidence 99.9%, this is the smoothed classifier's class; no radius is certified."
    )
    few = certify(client, images[1], mode="predict", n=50)
    assert (few["abstained"], few["stopped"]) == (True, "cap")


def test_the_server_and_the_library_agree_on_every_plan(
    client: httpx.Client, images: list[bytes], operator: Issuer
) -> None:
    library = SmoothedClassifier.load("bundled:cifar10", issuer=operator)
    for parameters in ({"radius": 0.2}, {"tolerance": 0.1}):
        plan = Plan(n=100_000, **parameters)
        served = certify(client, images[3], **parameters, n=100_000)["certificate"]
        assert served == library.certify(images[3], plan).to_json()
