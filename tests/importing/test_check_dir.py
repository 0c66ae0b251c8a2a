"""`macer import --check-dir` tells a wrong normalisation from a right one by a few labelled images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from importing.foreign_files import linear_model, macer
from PIL import Image

from macer_serve.errors import DataError
from macer_serve.evaluation.sanity import NoisyAccuracy, labelled_images

LEVELS = {"dark": 60, "bright": 195}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, level in LEVELS.items():
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(generator.integers(level - 40, level + 40, (4, 4, 3)).astype(np.uint8)).save(
                folder / f"{i}.png"
            )
    return tmp_path / "images"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """Which of two classes by the sum of the bytes."""
    weights = np.stack([np.zeros((3, 4, 4)), np.ones((3, 4, 4))])
    onnx.save(linear_model(weights, np.array([0.0, -48 * 127.5])), tmp_path / "net.onnx")
    (tmp_path / "names.txt").write_text("dark\nbright\n")
    return tmp_path / "net.onnx"


@pytest.mark.parametrize(("given", "right"), [("0,255", True), ("0,1", False)])
def test_a_wrong_range_is_warned_of(given: str, right: bool, network: Path, images: Path, tmp_path: Path) -> None:
    done = macer(
        "import", network, "--sigma", 0.25, "--classes", tmp_path / "names.txt", "--range", given,
        "--out", tmp_path / "out", "--check-dir", images,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"right on {40 if right else 20} of 40 images under noise of sigma 0.25" in done.stdout
    assert "(chance 50.0%)" in done.stdout
    assert ("WARNING: this is near chance" in done.stderr) == (not right)


def test_an_unreadable_image_is_named(network: Path, images: Path, tmp_path: Path) -> None:
    (images / "dark" / "3.png").write_text("not an image")
    done = macer(
        "import", network, "--sigma", 0.25, "--classes", tmp_path / "names.txt", "--range", "0,255",
        "--out", tmp_path / "out", "--check-dir", images,
    )  # fmt: skip
    assert done.exit_code == 4, done.output
    assert f"{images / 'dark' / '3.png'}: unreadable image" in done.stderr


@pytest.mark.parametrize(("correct", "near"), [(10, True), (20, True), (40, False), (100, False), (0, True)])
def test_near_chance_is_no_better_than_a_guess_or_hardly(correct: int, near: bool) -> None:
    assert NoisyAccuracy(correct, 100, 0.1).near_chance == near


def test_labels_come_from_names_or_else_from_the_order(images: Path) -> None:
    by_name = labelled_images(images, ("dark", "bright"), 500)
    assert {(path.parent.name, label) for path, label in by_name} == {("dark", 0), ("bright", 1)}
    by_order = labelled_images(images, ("0", "1"), 10)
    assert {(path.parent.name, label) for path, label in by_order} == {("bright", 0), ("dark", 1)}
    assert len(by_order) == 10
    for root, words in (
        (images, "not the network's classes"),
        (images / "dark", "no images"),
        (images / "x", "no images"),
    ):
        with pytest.raises(DataError, match=words):
            labelled_images(root, ("0", "1", "2"), 10)
