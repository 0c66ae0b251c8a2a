"""A server that reveals buckets: its answers, streams and probes show no votes, and its certificates are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving.conftest import Server, running, shipped_config

from macer_serve.checkpoint import load_config
from macer_serve.issuing import Issuer, KeySet
from macer_serve.smoothing.short_claim import digest_of
from macer_serve.verification import Verdict
from macer_serve.verification.short_claims import read_claim, verify_claim

GRID = [0.1, 0.25, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("withheld") / "certificates"


@pytest.fixture(scope="module")
def hiding(folder: Path) -> Iterator[Server]:
    """The shipped model, whose radii are not published."""
    config = shipped_config()
    arguments = config["applications"][0]["args"]
    arguments["withheld_dir"] = str(folder)
    arguments["models"]["cifar10"] |= {"num_cpus": 0, "reveal": "bucket", "bucket_grid": GRID}
    with running(config) as server:
        yield server


def test_a_bucket_over_http(hiding: Server, folder: Path, images: list[bytes], operator: Issuer) -> None:
    with httpx.Client(base_url=hiding.url, timeout=200) as client:
        response = client.post("/predict", content=images[1])
        assert response.status_code == 200, response.text
        answer = response.json()
        assert set(answer) == {"label", "class_id", "abstained", "radius", "claim", "claim_jws", "issued_at"}
        assert answer["radius"] in (0, *GRID)
        assert not any(name.lower().startswith("x-") for name in response.headers if name.lower() != "x-request-id")
        document = read_claim(response.content)
        assert document is not None
        keys = KeySet.read(client.get("/.well-known/jwks.json").content)
        config = load_config("bundled:cifar10")
        assert verify_claim(document, images[1], config, keys=keys).verdict is Verdict.WITHHELD
        evidence = (folder / f"{answer['claim']['withheld'].removeprefix('sha256:')}.jws").read_bytes()
        assert digest_of(evidence) == answer["claim"]["withheld"]
        assert verify_claim(document, images[1], config, keys=keys, withheld=evidence).verdict is Verdict.CONSISTENT
        assert list(operator.keys) == list(keys)

        again = client.post("/predict?stream=true", content=images[1]).text
        events = [block.split("\n") for block in again.strip().split("\n\n")]
        assert [lines[0] for lines in events if lines[0].startswith("event")] == ["event: result"]
        streamed = json.loads(events[-1][1].removeprefix("data: "))
        assert {**streamed, "issued_at": None} == {**answer, "issued_at": None}
        assert len(list(folder.iterdir())) == 1, "the same request has the same certificate"

        for telling in ("n=100", "alpha=0.01", "tolerance=0.1", "timeout_s=1", "mode=predict", "radius=0.2"):
            refused = client.post(f"/predict?{telling}", content=images[1])
            assert (refused.status_code, refused.headers["content-type"]) == (422, "application/problem+json"), telling
        assert client.get("/readyz").json()["models"]["cifar10"].keys() == {"engine"}
        (model,) = client.get("/models").json()
        assert (model["reveal"], model["bucket_grid"]) == ("bucket", GRID)
        operations = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["responses"]["200"]
        assert "ShortAnswer" in json.dumps(operations)
