"""The HTTP contract, on a real server: what is answered, that it can be repeated, and what faults do to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from serving.conftest import calls_of

from macer_serve.issuing import Issuer
from macer_serve.serving.problems import TIME_IN
from macer_serve.serving.schemas import Answer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions

PNG = {"content-type": "image/png"}
QUICK = Plan(n0=100, n=1000, alpha=0.01)
PARAMETERS = ["model", "n", "alpha", "radius", "tolerance", "mode", "coarse", "timeout_s", "stream"]
FIELDS = [
    "label",
    "class_id",
    "abstained",
    "radius",
    "upload_radius",
    "level",
    "group",
    "group_radius",
    "group_upload_radius",
    "top",
    "reason",
    "stopped",
    "certificate",
    "certificate_jws",
    "issued_at",
    "timing_ms",
]


def certify(client: httpx.Client, image: bytes, model: str = "quick", **parameters: Any) -> dict[str, Any]:
    answer = client.post("/predict", params={"model": model, **parameters}, content=image, headers=PNG)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def assert_problem(answer: httpx.Response, status: int, says: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert set(document) == {"type", "title", "status", "detail"}
    assert document["status"] == status
    assert says in document["detail"]
    assert ("retry-after" in answer.headers) == (status in (429, 503))


@pytest.fixture(scope="module")
def in_process(operator: Issuer, quick_checkpoint: Path) -> SmoothedClassifier:
    """The same classifier as the server's `quick`, as a library."""
    options = VoterOptions(engine="torch", workers=1, compile=False)
    return SmoothedClassifier.load(quick_checkpoint, issuer=operator, options=options)


def test_an_answer_has_the_documented_fields(client: httpx.Client, images: list[bytes], operator: Issuer) -> None:
    answer = certify(client, images[1], model="cifar10")
    assert list(answer) == FIELDS
    assert Answer.model_validate(answer).label == "ship"
    assert answer["abstained"] is False
    assert answer["radius"] == answer["upload_radius"] > 0
    assert answer["reason"] is None
    assert answer["stopped"] in ("tolerance", "cap")
    assert set(answer["timing_ms"]) == {"queue", "decode", "certify"}
    assert answer["top"][0] == {"label": "ship", "class_id": 8, "votes": max(answer["certificate"]["votes"])}
    certificate = Certificate.from_json(answer["certificate"])
    assert operator.keys.open(answer["certificate_jws"]).payload == certificate.canonical()
    assert (certificate.n0, sum(certificate.votes)) == (100, certificate.n)
    assert certificate.n <= 10_000
    for field in ("label", "class_id", "abstained", "radius", "upload_radius", "reason", "stopped"):
        assert answer["certificate"][field] == answer[field]


def test_multipart_raw_and_both_paths_give_the_same_certificate(client: httpx.Client, images: list[bytes]) -> None:
    raw = certify(client, images[1])["certificate"]
    again = certify(client, images[1])["certificate"]
    upload = {"file": ("any name.png", images[1], "image/png")}
    multipart = client.post("/predict", params={"model": "quick"}, files=upload).json()["certificate"]
    versioned = client.post("/v1/predict", params={"model": "quick"}, content=images[1], headers=PNG).json()
    # The type a client declares chooses how the body is read; the file itself says what it is.
    mislabelled = client.post(
        "/predict", params={"model": "quick"}, content=images[1], headers={"content-type": "image/jpeg"}
    ).json()
    assert raw == again == multipart == versioned["certificate"] == mislabelled["certificate"]


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 90}), ("WEBP", {"lossless": True})])
def test_jpeg_and_webp_are_accepted(client: httpx.Client, images: list[bytes], kind: str, options: Any) -> None:
    file = BytesIO()
    Image.open(BytesIO(images[1])).save(file, kind, **options)
    headers = {"content-type": f"image/{kind.lower()}"}
    answer = client.post("/predict", params={"model": "quick"}, content=file.getvalue(), headers=headers).json()
    assert answer["label"] == "ship"
    same_pixels = kind == "WEBP"
    digest = certify(client, images[1], n=1)["certificate"]["input"]["digest"]
    assert (answer["certificate"]["input"]["digest"] == digest) == same_pixels


def test_votes_depend_on_nothing_that_runs_beside_them(client: httpx.Client, images: list[bytes]) -> None:
    """Mixed models, images and caps at once, on shared passes and two replicas: each as if it were alone."""
    asked = [(images[i % 5], ("quick", "quick", "cifar10")[i % 3], {} if i % 4 else {"n": 130}) for i in range(18)]

    def ask(request: tuple[bytes, str, dict[str, int]]) -> Any:
        image, model, parameters = request
        return certify(client, image, model, **({"n": 700} if model == "cifar10" else parameters))["certificate"]

    with ThreadPoolExecutor(7) as threads:
        together = list(threads.map(ask, asked))
    alone = {}
    for request, certificate in zip(asked, together, strict=True):
        key = (request[0], request[1], *request[2])
        alone[key] = alone.get(key) or ask(request)
        assert certificate == alone[key]


def test_the_server_and_the_library_issue_the_same_certificate(
    client: httpx.Client, images: list[bytes], in_process: SmoothedClassifier
) -> None:
    """Two replicas behind HTTP, or one voter in this process: the same votes, radius and mac."""
    for image in images[:3]:
        assert certify(client, image)["certificate"] == in_process.certify(image, QUICK).to_json()


def test_another_pixel_meets_other_noise(client: httpx.Client, images: list[bytes]) -> None:
    pixels = np.array(Image.open(BytesIO(images[0])).convert("RGB"))  # votes are split
    pixels[16, 16, 0] ^= 1
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    one, other = (certify(client, image)["certificate"] for image in (images[0], file.getvalue()))
    assert one["input"]["digest"] != other["input"]["digest"]
    assert one["votes"] + one["selection_votes"] != other["votes"] + other["selection_votes"]


def test_a_cap_below_the_plan_reads_the_same_votes_and_abstains(client: httpx.Client, images: list[bytes]) -> None:
    whole = certify(client, images[1])["certificate"]
    capped = certify(client, images[1], n=999)
    assert capped["abstained"] is True
    assert (capped["label"], capped["class_id"], capped["radius"], capped["upload_radius"]) == (None, None, 0, 0)
    assert capped["stopped"] == "cap"
    assert "cap on votes was reached after 999 of 1,000" in capped["reason"]
    assert capped["certificate"]["n"] == sum(capped["certificate"]["votes"]) == 999
    assert capped["certificate"]["selection_votes"] == whole["selection_votes"]
    assert sum(np.subtract(whole["votes"], capped["certificate"]["votes"])) == 1
    assert min(np.subtract(whole["votes"], capped["certificate"]["votes"])) == 0
    assert certify(client, images[1], n=1000)["certificate"] == whole


def test_a_smaller_alpha_reads_the_same_votes_for_a_smaller_radius(client: httpx.Client, images: list[bytes]) -> None:
    usual, careful = certify(client, images[1]), certify(client, images[1], alpha=0.0001)
    assert careful["certificate"]["votes"] == usual["certificate"]["votes"]
    assert 0 < careful["radius"] < usual["radius"]
    assert careful["certificate"]["statement"].startswith("With confidence 99.99%")


def test_split_votes_are_an_abstention_in_words(client: httpx.Client, grey: bytes) -> None:
    answer = certify(client, grey, alpha=1e-12, coarse=False)  # of a thousand votes, 61 % would be certain
    assert answer["abstained"] is True
    assert answer["stopped"] == "n"
    assert re.match(r"votes were split: \w+ [\d.]+ %, \w+ [\d.]+ %; ", answer["reason"]), answer["reason"]
    # Whether the first votes promised a class or only a group depends on the engine, in a vote or two.
    hidden = answer["reason"].endswith("; a class was not to be expected, and coarse answers are hidden")
    assert hidden or "more than 50 %" in answer["reason"]


@pytest.mark.parametrize("timeout_s", [0.001, 5e-324])  # half of the smallest number above zero is zero
def test_a_deadline_returns_what_is_proved_so_far(client: httpx.Client, images: list[bytes], timeout_s: float) -> None:
    answer = certify(client, images[1], model="cifar10", timeout_s=timeout_s)
    assert (answer["abstained"], answer["stopped"]) == (True, "deadline")
    assert "deadline was reached after " in answer["reason"]
    assert answer["certificate"]["n"] < 10_000


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"n": 1001}, "n must not exceed this model's 1000"),
        ({"n": 0}, "n: "),
        ({"n": -5}, "n: "),
        ({"n": "ten"}, "n: "),
        ({"n": "9" * 40}, "n must not exceed"),
        ({"alpha": 0.06}, "alpha must not exceed this server's 0.05"),
        ({"alpha": 0}, "alpha: "),
        ({"alpha": "nan"}, "alpha"),
        ({"alpha": "inf"}, "alpha"),
        ({"timeout_s": 151}, "timeout_s must not exceed this server's 150"),
        ({"timeout_s": 0}, "timeout_s: "),
        ({"timeout_s": "nan"}, "timeout_s"),
        ({"radius": 0.5}, "plan is fixed: it offers neither radius nor tolerance"),
        ({"tolerance": 0.1}, "plan is fixed: it offers neither radius nor tolerance"),
        ({"model": "cifar10", "radius": 0.5, "tolerance": 0.1}, "two plans: give one of them"),
        ({"model": "cifar10", "radius": 0}, "radius: "),
        ({"model": "cifar10", "radius": "nan"}, "radius"),
        ({"model": "cifar10", "tolerance": -0.1}, "tolerance: "),
        ({"model": "cifar10", "n": 100_001}, "n must not exceed this model's 100000"),
        ({"mode": "predict", "radius": 0.5}, "predict takes n and alpha only"),
        ({"mode": "predict", "n": 1001}, "n must not exceed this model's 1000"),
        ({"mode": "guess"}, "mode: "),
        ({"stream": "perhaps"}, "stream: "),
        ({"seed": 7}, "unknown parameter seed"),
        ({"n": ["10", "1000"]}, "n is given more than once"),
    ],
)
def test_a_parameter_outside_its_limits_is_refused(
    client: httpx.Client, images: list[bytes], parameters: dict[str, Any], says: str
) -> None:
    answer = client.post("/predict", params={"model": "quick", **parameters}, content=images[1], headers=PNG)
    assert_problem(answer, 422, says)


def test_other_mistakes_are_named(client: httpx.Client, images: list[bytes]) -> None:
    image = images[1]
    assert_problem(client.post("/predict", params={"model": "x"}, content=image, headers=PNG), 404, "cifar10, quick")
    assert_problem(client.post("/predict", content=image, headers={"content-type": "text/plain"}), 415, "multipart")
    assert_problem(client.post("/predict", data={"file": "text"}, files={}), 415)
    assert_problem(client.post("/predict", content=b"", headers=PNG), 400, "empty")
    assert_problem(client.get("/nothing"), 404)


def test_the_request_id_is_echoed(client: httpx.Client) -> None:
    assert client.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    refused = client.post("/predict", content=b"", headers={**PNG, "X-Request-ID": "mine-2"})
    assert refused.headers["x-request-id"] == "mine-2"
    assert client.get("/healthz").headers["x-request-id"]


def test_the_server_describes_itself(client: httpx.Client, in_process: SmoothedClassifier) -> None:
    cifar10, quick = client.get("/models").json()
    assert (cifar10["name"], quick["name"]) == ("cifar10", "quick")
    assert (cifar10["default"], quick["default"]) == (True, False)
    assert quick["digest"] == in_process.config.digest
    assert quick["classes"] == list(in_process.config.classes)
    assert (quick["sigma"], quick["noise"]) == (in_process.config.sigma, in_process.noise.name)
    assert quick["plan"] == in_process.policy_plan(QUICK).to_json()
    assert (cifar10["plan"]["kind"], cifar10["plan"]["n"], cifar10["cap"]) == ("tolerance", 100_000, 10_000)
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert ready["status"] == "ready"
    assert in_process.voter is not None
    assert ready["models"]["quick"]["engine"] == in_process.voter.engine


def test_the_documentation_shows_both_bodies_and_the_answer(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]
    kinds = {"multipart/form-data", "application/json", "application/octet-stream"}
    assert set(predict["requestBody"]["content"]) == kinds | {"image/png", "image/jpeg", "image/webp"}
    assert {p["name"] for p in predict["parameters"]} == set(PARAMETERS)
    answers = predict["responses"]["200"]["content"]["application/json"]["schema"]["anyOf"]
    assert [answer["$ref"].rpartition("/")[2] for answer in answers] == ["Answer", "ShortAnswer"]
    assert set(document["components"]["schemas"]["Answer"]["properties"]) == set(FIELDS)
    for status in ("400", "404", "408", "413", "415", "422", "429", "503"):
        assert "application/problem+json" in predict["responses"][status]["content"]
    keys = "/.well-known/jwks.json"
    assert set(document["paths"]) == {"/predict", "/v1/predict", "/models", "/healthz", "/readyz", keys}
    assert '"example": {}' not in json.dumps(document)
    assert all(kind for answers in predict["responses"].values() for kind in answers["content"].values())
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_headers_that_would_lift_ray_s_time_out_do_not_lift_the_deadline(
    client: httpx.Client, images: list[bytes]
) -> None:
    for value in ("0", "-1", "nonsense"):
        answer = client.post(
            "/predict",
            params={"model": "cifar10", "timeout_s": 0.001},
            content=images[1],
            headers={**PNG, "x-request-timeout-seconds": value},
        )
        assert answer.json()["stopped"] == "deadline"


def computed(server: Any) -> float:
    """Returns the seconds of processor time that the voter of `cifar10` has taken."""
    times = [psutil.Process(pid).cpu_times() for pid in server.processes("ray::ServeReplica:macer:voter-cifar10")]
    return sum(taken.user + taken.system for taken in times)


@pytest.mark.parametrize("stream", ["", "&stream=true"])
@pytest.mark.parametrize("header", ["", "x-request-disconnect-disabled: ?1\r\n"])
def test_a_client_that_leaves_frees_the_voter(
    server: Any, client: httpx.Client, images: list[bytes], header: str, stream: str
) -> None:
    """With Ray's cancelling switched off by the client, too."""

    before = calls_of(client, "cifar10")
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:
        head = f"POST /predict?tolerance=1e-6&n=100000{stream} HTTP/1.1\r\nHost: localhost\r\n{header}"
        leaving.sendall(
            f"{head}Content-Type: image/png\r\nContent-Length: {len(images[1])}\r\n\r\n".encode() + images[1]
        )
        while calls_of(client, "cifar10") == before:
            pass
    next_one = {"model": "cifar10", "tolerance": 1e-6, "n": 1000}
    deadline = time.monotonic() + 30
    while (answer := client.post("/predict", params=next_one, content=images[2], headers=PNG)).status_code == 429:
        assert time.monotonic() < deadline, "the place of a client that left is not given back"
    assert answer.status_code == 200, answer.text
    made, began = calls_of(client, "cifar10"), computed(server)
    time.sleep(2)
    assert computed(server) - began < 1  # of the four seconds that two cores would spend on the one who left
    assert calls_of(client, "cifar10") == made


def test_more_requests_than_places_are_asked_to_come_back(
    server: Any, client: httpx.Client, images: list[bytes]
) -> None:
    head = b"POST /predict?tolerance=1e-6&n=5000 HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    head += f"Content-Length: {len(images[1])}\r\n\r\n".encode()
    holding: list[socket.socket] = []
    deadline = time.monotonic() + 60
    try:
        answer = client.get("/readyz")
        while answer.status_code == 200 and time.monotonic() < deadline:
            for _ in range(8):  # as many as there are places: one of these may still be held by the request before
                holding.append(socket.create_connection(("127.0.0.1", server.port)))
                holding[-1].sendall(head + images[1])
            answer = client.post("/predict?model=quick", content=images[1], headers=PNG)
        assert_problem(answer, 429, "in work already")
        assert TIME_IN.decode() not in answer.headers
        assert client.get("/readyz").status_code == 200  # overload is not unreadiness
    finally:
        for connection in holding:
            connection.close()
    while client.post("/predict?model=quick", content=images[1], headers=PNG).status_code == 429:
        assert time.monotonic() < deadline, "the places of clients that left are not given back"


def test_idle_uploads_hold_no_place(server: Any, client: httpx.Client, images: list[bytes]) -> None:
    head = b"POST /predict?model=quick HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    holding = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(24)]  # three times the places
    try:
        for connection in holding:
            connection.sendall(head)  # and never the body
        for image in images[:3]:
            certify(client, image)
    finally:
        for connection in holding:
            connection.close()


def test_the_private_key_is_nowhere_to_be_seen(server: Any, client: httpx.Client, operator: Issuer) -> None:
    shown = [server.serve("status"), server.serve("config"), server.log()]
    assert "RUNNING" in shown[0]
    assert "key_file" in shown[1]
    for path in ("/models", "/readyz", "/openapi.json", "/.well-known/jwks.json"):
        shown.append(client.get(path).text)
    private = [json.loads(operator.to_key_file())["keys"][0][name] for name in ("d", "p", "q")]
    assert not [text for text in shown if any(number in text for number in private)]
    leaks = [
        path
        for path in Path(server.folder).rglob("*")
        if path.is_file() and path.name != "issuer.key" and any(n.encode() in path.read_bytes() for n in private)
    ]
    assert not leaks


@pytest.mark.parametrize("model", ["quick", "cifar10"])
def test_a_voter_lost_in_the_middle_changes_no_certificate(
    server: Any, client: httpx.Client, images: list[bytes], model: str
) -> None:
    """One of two replicas, then the only one: its draws are made again elsewhere, or by its successor."""
    expected = certify(client, images[3], model)["certificate"]
    replicas = server.processes(f"ray::ServeReplica:macer:voter-{model}")
    before = calls_of(client, model)

    def ask(_: int) -> httpx.Response:
        return client.post("/predict", params={"model": model}, content=images[3], headers=PNG)

    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(ask, i) for i in range(3)]
        while calls_of(client, model) == before and not all(future.done() for future in asked):
            pass
        os.kill(replicas[0], signal.SIGKILL)
        answers = [future.result() for future in asked]
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["certificate"] == expected
        else:
            assert_problem(answer, 503)
    server.wait_until_ready()
    assert certify(client, images[3], model)["certificate"] == expected
