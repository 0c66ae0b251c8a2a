"""How clients of other servers send an image, and what each is answered: a certificate, or what to do instead."""

from __future__ import annotations

import base64
import http.client
import io
import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from PIL import Image
from serving.conftest import Server, running, shipped_config

from macer_serve.serving.settings import AppSettings

MIB = 2**20
PROBLEM = "application/problem+json"
TOO_LARGE = bytes(20 * MIB)
QUERY = "model=quick&n=1"


@pytest.fixture(scope="module")
def certificate(server: Server, ship: Path) -> Any:
    """The certificate that every accepted way of sending the ship must give."""
    answer = httpx.post(f"{server.url}/predict?{QUERY}", files={"file": ship.read_bytes()}, timeout=200)
    return answer.json()["certificate"]


def curl(*arguments: str) -> tuple[int, dict[str, str], bytes]:
    """Returns status, headers and body of curl's answer; curl must have met no error."""
    command = ["curl", "-s", "-S", "-i", "-H", "Expect:", *arguments]
    done = subprocess.run(command, capture_output=True, check=True, timeout=200)
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, body


def jpeg(path: Path) -> bytes:
    file = io.BytesIO()
    Image.open(path).save(file, "JPEG")
    return file.getvalue()


WAYS = {
    "curl -F": ["-F", "file=@{ship}"],
    "image/png": ["-H", "Content-Type: image/png", "--data-binary", "@{ship}"],
    "image/jpg": ["-H", "Content-Type: image/jpg", "--data-binary", "@{ship}"],
    "image/x-png, upper case": ["-H", "Content-Type: IMAGE/X-PNG", "--data-binary", "@{ship}"],
    "octet-stream": ["-H", "Content-Type: application/octet-stream", "--data-binary", "@{ship}"],
    "no type": ["-H", "Content-Type:", "--data-binary", "@{ship}"],
    "a type with parameters": ["-H", "Content-Type: image/png; charset=binary", "--data-binary", "@{ship}"],
    "JSON": ["-H", "Content-Type: application/json", "-d", '{{"image": "{base64}"}}'],
    "JSON, a data URL": ["-H", "Content-Type: application/json", "-d", '{{"image": "data:image/png;base64,{base64}"}}'],
    "JSON with a charset": ["-H", "Content-Type: application/json; charset=utf-8", "-d", '{{"image":"{base64}"}}'],
    "chunked": ["-H", "Content-Type: image/png", "-H", "Transfer-Encoding: chunked", "--data-binary", "@{ship}"],
    "a part with a wrong type": ["-F", "file=@{ship};type=text/plain;filename=x.txt"],
    "HTTP/1.0": ["-0", "-F", "file=@{ship}"],
}


PATHS = ("/predict/", "/v1/predict", "/v1/predict/")


@pytest.mark.parametrize(
    ("way", "path"),
    [*((way, "/predict") for way in WAYS), *((way, path) for way in ("curl -F", "JSON") for path in PATHS)],
)
def test_every_usual_way_gives_the_certificate(
    server: Server, ship: Path, certificate: Any, way: str, path: str
) -> None:
    encoded = base64.b64encode(ship.read_bytes()).decode()
    arguments = [argument.format(ship=ship, base64=encoded) for argument in WAYS[way]]
    status, _, body = curl(*arguments, f"{server.url}{path}?{QUERY}")
    assert status == 200, body
    assert json.loads(body)["certificate"] == certificate


def test_a_jpeg_under_its_common_wrong_name(client: httpx.Client, ship: Path) -> None:
    answer = client.post(f"/predict?{QUERY}", content=jpeg(ship), headers={"content-type": "image/jpg"})
    assert answer.status_code == 200
    assert answer.json()["certificate"]["input"]["upload_shape"] == [32, 32, 3]


MISTAKES: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "another name": ({"files": {"image": b"S"}}, 400, "Image cannot be decoded", "'image'"),
    "two files": ({"files": [("file", b"S"), ("file", b"S")]}, 422, "More than one image", "a request for each"),
    "three files": ({"files": [("file", b"S")] * 3}, 422, "More than one image", "3 files"),
    "a field": ({"files": {"file": b"S"}, "data": {"n": "1"}}, 422, "Parameter outside its allowed range", "'n'"),
    "a second part": ({"files": {"file": b"S", "mask": b"S"}}, 422, "Parameter outside its allowed range", "'mask'"),
    "urlencoded": (
        {"content": b"S", "headers": {"content-type": "application/x-www-form-urlencoded"}},
        415,
        "Image type is not supported",
        "curl -F file=@IMAGE",
    ),
    "text": ({"content": b"S", "headers": {"content-type": "text/plain"}}, 415, "Image type is not supported", "JSON"),
    "no JSON": (
        {"content": b"{", "headers": {"content-type": "application/json"}},
        400,
        "Image cannot be decoded",
        "not JSON",
    ),
    "JSON of another server": ({"json": {"instances": [{"b64": "S"}]}}, 400, "Image cannot be decoded", "'image'"),
    "JSON with a parameter": ({"json": {"image": "", "n": 1}}, 422, "Parameter outside its allowed range", "'n'"),
    "JSON of several": ({"json": {"image": ["", ""]}}, 422, "More than one image", "a request for each"),
    "JSON of a number": ({"json": {"image": 1}}, 400, "Image cannot be decoded", "base64"),
    "JSON without base64": ({"json": {"image": "http://example.org/x.png"}}, 400, "Image cannot be decoded", "base64"),
    "JSON, a list": ({"json": ["x"]}, 400, "Image cannot be decoded", "'image'"),
    "a gif": ({"content": b"GIF89a" + bytes(50), "headers": {"content-type": "image/gif"}}, 415, "Image type", ""),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(client: httpx.Client, ship: Path, case: str) -> None:
    request, status, title, says = MISTAKES[case]

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(filled, value))
        return ship.read_bytes() if value == b"S" else value

    answer = client.post(f"/predict?{QUERY}", **filled(request))
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), answer.text
    assert answer.json()["title"].startswith(title)
    assert says in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/predict", "/predict/", "/v1/predict"])
def test_get_predict_says_post(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "curl -F file=@" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/models", "/docs"])
def test_head_answers_as_get_does_without_a_body(server: Server, path: str) -> None:
    status, headers, body = curl("-I", server.url + path)
    assert (status, body) == (200, b"")
    assert headers["content-type"] == httpx.get(server.url + path, timeout=60).headers["content-type"]


def test_metrics_are_pointed_to(client: httpx.Client) -> None:
    answer = client.get("/metrics")
    assert (answer.status_code, answer.headers["content-type"]) == (404, PROBLEM)
    address = answer.json()["detail"].rpartition(" ")[2]
    assert "# TYPE ray_" in httpx.get(address, timeout=60).text


def test_other_origins_are_answered_nothing_by_default(server: Server) -> None:
    preflight = ["-X", "OPTIONS", "-H", "Origin: http://a.example", "-H", "Access-Control-Request-Method: POST"]
    status, headers, _ = curl(*preflight, f"{server.url}/predict")
    assert status == 405
    _, asked, _ = curl("-H", "Origin: http://a.example", f"{server.url}/models")
    assert not [name for name in headers | asked if name.startswith("access-control-")]


def test_configured_origins_may_use_the_server(images: list[bytes]) -> None:
    config = shipped_config()
    arguments = config["applications"][0]["args"]
    arguments["models"]["cifar10"] |= {"num_cpus": 0, "n": 1000, "cap": 1000}
    arguments["cors_origins"] = ["http://a.example", "https://b.example:8443"]
    with running(config, "macer", "serve") as server:
        for origin, allowed in {
            "http://a.example": True,
            "https://b.example:8443": True,
            "http://c.example": False,
        }.items():
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asked["Access-Control-Request-Headers"] = "content-type"
            preflight = httpx.options(f"{server.url}/predict", headers=asked, timeout=60)
            assert preflight.is_success == allowed
            answer = httpx.post(f"{server.url}/predict", files={"file": images[0]}, headers=asked, timeout=200)
            refused = httpx.post(f"{server.url}/predict?x=1", files={"file": images[0]}, headers=asked, timeout=200)
            for one in (preflight, answer, refused):
                assert one.headers.get("access-control-allow-origin") == (origin if allowed else None)
            assert (answer.status_code, refused.status_code) == (200, 422)


def test_an_origin_is_a_scheme_and_a_host() -> None:
    models = {"a": {"checkpoint": "bundled:cifar10"}}
    for origin in ("*", "https://a.example", "http://localhost:3000"):
        AppSettings.model_validate({"models": models, "cors_origins": [origin]})
    for origin in ("a.example", "https://a.example/", "ftp://a.example", ""):
        with pytest.raises(ValueError, match=r"cors_origins\.0"):
            AppSettings.model_validate({"models": models, "cors_origins": [origin]})


@pytest.mark.parametrize("path", [f"/predict?{QUERY}", "/predict?model=nothing", "/predict?x=1", "/nothing", "/models"])
@pytest.mark.parametrize("kind", ["image/png", "application/json", "text/plain"])
def test_a_refused_body_is_read_and_answered(server: Server, path: str, kind: str) -> None:
    """Clients that send all of a request before they read the answer, each without an error of the connection."""
    url = server.url + path
    expected = {"/predict?model=nothing": 404, "/predict?x=1": 422, "/nothing": 404, "/models": 405}.get(
        path, 415 if kind == "text/plain" else 413
    )
    request = urllib.request.Request(url, TOO_LARGE, {"Content-Type": kind}, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=100)
    assert (refused.value.code, refused.value.headers["content-type"]) == (expected, PROBLEM)
    refused.value.close()
    with requests.Session() as session:
        assert session.post(url, data=TOO_LARGE, headers={"Content-Type": kind}, timeout=100).status_code == expected
        assert session.get(f"{server.url}/healthz", timeout=60).status_code == 200
    assert httpx.post(url, content=TOO_LARGE, headers={"Content-Type": kind}, timeout=100).status_code == expected


@pytest.mark.parametrize("how", [["-H", "Transfer-Encoding: chunked"], ["-0"], [], ["-H", "Expect: 100-continue"]])
def test_curl_reads_the_refusal_of_a_large_file(server: Server, tmp_path: Path, how: list[str]) -> None:
    (tmp_path / "large").write_bytes(TOO_LARGE)
    large = str(tmp_path / "large")
    for body in (["-F", f"file=@{large}"], ["-H", "Content-Type: image/png", "--data-binary", f"@{large}"]):
        url = f"{server.url}/predict?{QUERY}"
        done = subprocess.run(
            ["curl", "-s", "-S", "-w", "%{http_code}", *how, *body, url], capture_output=True, timeout=100, check=True
        )
        assert done.stdout.endswith(b"413"), done


def test_a_connection_that_is_kept_serves_on_after_a_refused_body(server: Server, ship: Path, certificate: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=100)
    connection.connect()
    socket = connection.sock
    for _ in range(2):
        connection.request("POST", f"/predict?{QUERY}", TOO_LARGE, {"Content-Type": "image/png"})
        refused = connection.getresponse()
        assert refused.status == 413
        assert b"too large" in refused.read()
        connection.request("POST", f"/predict?{QUERY}", ship.read_bytes(), {"Content-Type": "image/png"})
        answer = connection.getresponse()
        assert json.loads(answer.read())["certificate"] == certificate
        assert connection.sock is socket  # not one of a new connection
    connection.close()
