"""Imported networks behind the real server: `docs/own-model.md` as written, every kind of file, and a black box."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import torch
import yaml
from click.testing import CliRunner
from importing.foreign_files import CASES, SIGMA, linear_model
from linear_problems import ANYWHERE, COLOUR, FALSE_ALARM, GCD3, Problem, margins
from PIL import Image
from scipy.stats import binom
from serving.conftest import ROOT, Server, running
from torch import nn

from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.smoothing.plan import Plan

DOCUMENT = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
BLACK_BOX = Plan(n0=100, n=400, alpha=0.05)
RUNS = {"linear": 1000, "sequential": 500}
# Per model: its network, its settings beside those of BLACK_BOX, and the parameters that requests take in turns.
BLACK_BOXES: dict[str, tuple[Problem, dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "linear": (COLOUR, {}, ({},)),
    "sequential": (
        GCD3,
        {"tolerance": 0.02, "n_predict": 200},
        ({}, {"radius": 0.1}, {"tolerance": 0.2}, {"n": 150}, {"alpha": 0.02}, {"mode": "predict"}),
    ),
}
QUICK = {"precision": "fp32", "batch": 32, "workers": 1, "compile": False}
KINDS = ("torchvision", "onnx", "cohen", "macer", "denoiser")


def documented(start: str) -> str:
    """The first command of the document that starts so."""
    found = re.search(rf"^    ({re.escape(start)}.*)$", DOCUMENT, re.MULTILINE)
    assert found, start
    return found[1].strip()


def macer(command: str | list[str]) -> None:
    arguments = shlex.split(command)[1:] if isinstance(command, str) else command
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the user of the document has: a network, the names of its classes, a picture."""
    folder = tmp_path_factory.mktemp("user")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), folder / "net.onnx", dynamo=True, verbose=False)
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "picture.png").write_bytes((ROOT / "tests" / "images" / "0000-cat.png").read_bytes())
    return folder


def black_box(folder: Path, problem: Problem, name: str) -> Path:
    """The linear classifier of closed form as an ONNX file: [w.z >= t] of the bytes z."""
    weights = problem.weights.transpose(2, 0, 1)
    both = np.stack([np.zeros_like(weights), weights])
    onnx.save(linear_model(both, np.array([0.0, 0.5 - problem.t])), folder / f"{name}.onnx")
    options = ["--sigma", str(SIGMA), "--classes", "2", "--range", "0,255", "--out", str(folder / name)]
    macer(["import", str(folder / f"{name}.onnx"), *options])
    return folder / name


@pytest.fixture(scope="module")
def own(folder: Path) -> Iterator[Server]:
    """The shipped YAML with the document's one line changed, and the other networks beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        macer(documented("macer import net.onnx"))
    shipped = (ROOT / "deployments" / "smoothed.yaml").read_text()
    line = re.search(r"^ +checkpoint: runs/mine$", DOCUMENT, re.MULTILINE)
    assert line
    changed = re.sub(
        r"^ +checkpoint: bundled:cifar10.*$", line[0].replace("runs/", f"{folder}/runs/"), shipped, flags=re.M
    )
    assert sum(a != b for a, b in zip(shipped.splitlines(), changed.splitlines(), strict=True)) == 1
    config = yaml.safe_load(changed)
    models = config["applications"][0]["args"]["models"]
    assert models["cifar10"]["checkpoint"] == str(folder / "runs" / "mine")
    for name, (problem, changes, _) in BLACK_BOXES.items():
        models[name] = {"checkpoint": str(black_box(folder, problem, name)), "replicas": 2, **changes}
        models[name] |= {"n0": BLACK_BOX.n0, "n": BLACK_BOX.n, "alpha": BLACK_BOX.alpha}
        models[name] |= {"num_cpus": 0, "voter": {**QUICK, "batch": 512}}
    for name in KINDS:
        (folder / name).mkdir()
        case = CASES[name](folder / name)
        out = folder / f"{name} checkpoint"
        macer(["import", str(case.file), "--sigma", str(SIGMA), "--out", str(out), *case.options])
        models[name] = {"checkpoint": str(out), "n0": 20, "n": 100, "alpha": 0.05, "num_cpus": 0, "voter": QUICK}
    with running(config) as server:
        yield server


def test_three_commands_lead_from_a_network_to_a_certificate(own: Server, folder: Path) -> None:
    assert documented("serve run") == "serve run deployments/smoothed.yaml"
    command = documented("curl").replace("http://127.0.0.1:8000", own.url)
    done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, text=True, check=True, timeout=200)
    answer = json.loads(done.stdout)
    config = load_config(folder / "runs" / "mine")
    assert answer["certificate"]["model"] == {"name": "cifar10", "digest": config.digest}  # the YAML's name
    assert answer["label"] in ("cat", "dog", None)
    assert sum(answer["certificate"]["votes"]) == answer["certificate"]["n"] > 0
    assert answer["certificate"]["engine"].startswith("onnx-cpu-fp32-")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_served(name: str, own: Server, folder: Path) -> None:
    image = (folder / "picture.png").read_bytes()
    answer = httpx.post(f"{own.url}/predict?model={name}", files={"file": image}, timeout=200)
    assert answer.status_code == 200, answer.text
    certificate = answer.json()["certificate"]
    assert certificate["model"]["digest"] == load_config(folder / f"{name} checkpoint").digest
    assert sum(certificate["votes"]) == 100


@pytest.mark.parametrize("name", BLACK_BOXES)
def test_as_a_black_box_certificates_are_false_no_more_often_than_alpha(name: str, own: Server) -> None:
    """Distinct images near where the bound is most easily caught; an exact test, false alarms 1 in a million.

    Each image is asked about once, under one plan. One of the two replicas is killed in the middle.
    """
    (problem, _, plans), runs = BLACK_BOXES[name], RUNS[name]
    generator, levels = np.random.default_rng(2), margins(problem, BLACK_BOX, ANYWHERE)
    images = [problem.image(levels[i % len(levels)], generator) for i in range(runs)]
    assert len({image.tobytes() for image in images}) == runs
    with httpx.Client(base_url=own.url, timeout=200) as client, ThreadPoolExecutor(4) as pool:

        def ask(i: int) -> dict[str, Any]:
            if i == runs // 3:
                os.kill(own.processes(f"ray::ServeReplica:macer:voter-{name}")[0], signal.SIGKILL)
            query = {"model": name, **plans[i // len(levels) % len(plans)]}
            content, headers = png(images[i]), {"content-type": "image/png"}
            answer = client.post("/predict", params=query, content=content, headers=headers)
            assert answer.status_code == 200, answer.text
            return answer.json()  # type: ignore[no-any-return]

        answers = list(pool.map(ask, range(runs)))
    false = certified = 0
    for image, answer in zip(images, answers, strict=True):
        class_id, radius, _ = problem.truth(image)
        assert answer["certificate"]["alpha"] <= BLACK_BOX.alpha
        certified += not answer["abstained"]
        false += not answer["abstained"] and (answer["class_id"] != class_id or answer["radius"] > radius)
    assert certified > 0.2 * runs
    p = float(binom.sf(false - 1, runs, BLACK_BOX.alpha))
    assert p >= FALSE_ALARM, f"{false} of {runs} certificates are false at alpha = {BLACK_BOX.alpha}: p = {p:.2g}"
