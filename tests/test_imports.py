"""The house: imports point one way, the core runs without Ray and pydantic, `macer --help` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING_BUT_SERVING = [name for name in house.modules() if house.room(name) != "serving"]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_core_and_training_import_without_ray_and_pydantic() -> None:
    absent = "import sys\nfor name in ('ray', 'pydantic', 'fastapi', 'starlette'): sys.modules[name] = None\n"
    result = run(absent + "\n".join(f"import {module}" for module in EVERYTHING_BUT_SERVING))
    assert result.returncode == 0, result.stderr
    assert len(EVERYTHING_BUT_SERVING) > 25


def test_the_check_above_would_notice() -> None:
    assert run("import sys; sys.modules['ray'] = None\nimport macer_serve.serving.app").returncode != 0


@pytest.mark.parametrize("module", ["macer_serve.smoothed", "macer_serve.smoothing.certification", "macer_serve.fit"])
def test_what_the_ingress_holds_needs_no_torch(module: str) -> None:
    result = run(f"import sys, {module}\nassert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "scipy", "ray", "PIL", "onnx")
    code = (
        "import sys\nfrom macer_serve.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\nassert not loaded, loaded"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    for command in ("train", "certify", "report", "predict", "verify", "export", "import"):
        assert command in result.stdout


ALLOWED = {
    "smoothing": {"errors"},
    "voters": {"errors", "smoothing", "hardware", "base_classifier", "onnx_graph"},
    "checkpoint": {
        "errors",
        "architectures",
        "atomic_writes",
        "base_classifier",
        "locks",
        "onnx_graph",
        "onnx_trial",
        "smoothing",
    },
    "importing": {
        "errors",
        "architectures",
        "base_classifier",
        "checkpoint",
        "locks",
        "onnx_graph",
        "onnx_trial",
        "torchvision_networks",
        "voters",
    },
    "issuing": {"errors"},
    "verification": {
        "errors",
        "smoothed",
        "smoothing",
        "checkpoint",
        "issuing",
        "voters",
        "images",
        "fit",
        "hardware",
        "inputs",
    },
    "evaluation": {
        "atomic_writes",
        "errors",
        "locks",
        "ray_cluster",
        "smoothed",
        "smoothing",
        "checkpoint",
        "datasets",
        "class_names",
        "issuing",
        "voters",
    },
    "serving": {
        "errors",
        "atomic_writes",
        "ray_cluster",
        "smoothed",
        "smoothing",
        "checkpoint",
        "issuing",
        "voters",
        "images",
    },
}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    for path in (ROOT / "macer_serve" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ImportFrom) and node.module and not node.level):
                continue
            parts = node.module.split(".")
            if parts[0] == "macer_serve" and len(parts) > 1:
                assert parts[1] in ALLOWED[room] | {room, "version"}, f"{path} imports {node.module}"


ROOMS = (
    "smoothing",
    "issuing",
    "voters",
    "checkpoint",
    "importing",
    "verification",
    "evaluation",
    "serving",
    "cli",
    "training",
)


@pytest.mark.parametrize("package", ROOMS)
def test_no_modules_of_a_room_import_each_other(package: str) -> None:
    """Imports within functions and under `TYPE_CHECKING` count."""
    found = house.circles(house.imports())
    assert not [group for group in found if any(house.room(module) == package for module in group)]


def test_only_the_command_imports_the_trainer() -> None:
    graph = house.imports()
    trainer = {name for name in graph if house.room(name) == "training"}
    importing = {name for name, imported in graph.items() if imported & trainer}
    assert len(trainer) > 15
    assert {house.room(name) for name in importing} == {"training", "cli"}
    assert {name for name in importing if house.room(name) == "cli"} == {
        "macer_serve.cli.train",
        "macer_serve.cli.recipe_choice",
    }


def test_the_methods_know_neither_the_loop_nor_each_other() -> None:
    graph = house.imports()
    shared = {f"macer_serve.training.{name}" for name in ("method", "recipe")}
    methods = [name for name in graph if name.startswith("macer_serve.training.methods.")]
    assert len(methods) >= 3
    for name in methods:
        assert {module for module in graph[name] if house.room(module) == "training"} <= shared


def test_the_constants_of_training_are_known_without_torch() -> None:
    """`macer train --help`, and a folder that is missing, need no torch."""
    result = run("import sys\nsys.modules['torch'] = None\nimport macer_serve.cli.train, macer_serve.training.options")
    assert result.returncode == 0, result.stderr


def test_a_circle_would_be_seen() -> None:
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_noise_knows_no_state_machine() -> None:
    """Who draws noise needs neither plans nor bounds."""
    graph, reached, left = house.imports(), set(), ["macer_serve.smoothing.noise"]
    while left:
        reached.add(module := left.pop())
        left += graph[module] - reached
    assert {module.rpartition(".")[2] for module in reached} <= {
        "noise",
        "philox",
        "votes",
        "errors",
        "smoothing",
        "macer_serve",
    } | {"version"}


def test_no_test_module_imports_another() -> None:
    """What several test modules need stands in a conftest.py, or in a plain module that is named by what it makes."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            modules = [*names, (node.module or "")] if isinstance(node, ast.ImportFrom) else names
            found += [f"{path}:{node.lineno}" for name in modules if name.rpartition(".")[2].startswith("test_")]
    assert not found
