"""Our trainer runs, and never a folder or a package of the user that is called as our own is.

The trainer lies in the folder `training/` and is imported as `macer_serve.training`. A wheel holds it under that name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHADOW = 'raise SystemExit("SHADOWED: the training of the user was imported")\n'
TRAIN = "import sys; from macer_serve.cli import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip makes it of our wheel, which is built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("macer_serve", "training"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    made = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def run(wheel: Path, cwd: Path, code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the installed wheel: the tree of these tests is not on its path."""
    paths = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(wheel)]))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_a_wheel_has_one_package_at_its_top(wheel: Path) -> None:
    folders = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert folders == {"macer_serve"}
    ours = {path.relative_to(ROOT / "training") for path in (ROOT / "training").rglob("*.py")}
    there = {
        path.relative_to(wheel / "macer_serve" / "training") for path in wheel.glob("macer_serve/training/**/*.py")
    }
    assert ours == there
    assert not any(path.is_symlink() for path in wheel.rglob("*"))


def shadow(folder: Path, form: str) -> None:
    """What a user may have called `training`."""
    if form == "package":
        (folder / "training" / "methods").mkdir(parents=True)
        for file in ("__init__.py", "run.py", "recipes.py", "methods/__init__.py"):
            (folder / "training" / file).write_text(SHADOW)
    elif form == "module":
        (folder / "training.py").write_text(SHADOW)
    elif form == "folder of data":
        (folder / "training" / "cat").mkdir(parents=True)
    elif form == "compiled":
        (folder / "training.so").write_bytes(b"no library")
    elif form == "other names of ours":
        for name in ("recipes", "methods", "loop", "options", "run", "worker", "network", "images", "data"):
            (folder / f"{name}.py").write_text(SHADOW)


FORMS = ("package", "module", "folder of data", "compiled", "other names of ours")


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_of_that_name_where_the_command_runs_is_not_imported(wheel: Path, tmp_path: Path, form: str) -> None:
    shadow(tmp_path, form)
    refused = run(wheel, tmp_path, TRAIN, "train", "--dataset", "mnist", "--data-dir", "/nowhere")
    assert refused.returncode == 4, refused.stderr
    assert "mnist is not under /nowhere" in refused.stderr


@pytest.mark.parametrize("form", FORMS)
def test_our_trainer_trains_beside_one_of_that_name(wheel: Path, mnist: Path, tmp_path: Path, form: str) -> None:
    """On the path before ours, and in the working folder, too."""
    shadow(tmp_path, form)
    how = ("--dataset", "mnist", "--method", "gaussian", "--epochs", 1, "--batch", 16, "--held-out", 0)
    command = ("train", *how, "--compile", "off", "--device", "cpu", "--no-tensorboard", "--data-dir", mnist)
    done = run(wheel, tmp_path, TRAIN, *command, "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_one_that_is_already_imported_is_left_alone(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text("mine = True\n")
    code = (
        "import sys, training\nfrom macer_serve.cli.train import command\nimport macer_serve.training.run as run\n"
        "assert training.mine and sys.modules['training'] is training\n"
        "print(run.__file__)"
    )
    done = run(wheel, tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(wheel / "macer_serve" / "training" / "run.py")


def test_workers_of_ray_import_ours_too(wheel: Path, mnist: Path, tmp_path: Path) -> None:
    """Ray puts the folder of the driver on the path of its workers."""
    shadow(tmp_path, "package")
    how = ("--dataset", "mnist", "--method", "gaussian", "--epochs", 1, "--batch", 16, "--held-out", 0)
    command = ("train", *how, "--compile", "off", "--device", "cpu", "--no-tensorboard", "--data-dir", mnist)
    done = run(wheel, tmp_path, TRAIN, *command, "--workers", 2, "--threads", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
