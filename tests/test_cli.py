"""The command line: real commands on real files; users' mistakes get a sentence and an exit code, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from brightness import issuer
from click.testing import CliRunner, Result
from PIL import Image

from macer_serve.checkpoint import BUNDLED, load_config
from macer_serve.cli import main
from macer_serve.errors import ParameterError
from macer_serve.evaluation.certify import image_indices
from macer_serve.evaluation.logs import read_log

SHIP = Path(__file__).parent / "images" / "0001-ship.png"


def macer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_predict_prints_class_and_radius_and_repeats_itself_under_a_key(tmp_path: Path) -> None:
    key = tmp_path / "issuer.key"
    issuer().save(key)
    first = macer("predict", SHIP, "--n", 1000, "--key", key, "--json")
    assert first.exit_code == 0, first.output
    certificate = json.loads(first.stdout)["certificate"]
    assert certificate["label"] == "ship"
    assert certificate["radius"] > 0.2
    assert sum(certificate["votes"]) == certificate["n"] == 1000
    again = macer("predict", SHIP, "--n", 1000, "--key", key, "--json")
    assert again.stdout == first.stdout
    words = macer("predict", SHIP, "--n", 1000, "--key", key)
    assert words.stdout.startswith(f"ship  radius {certificate['radius']:.6f}")


@pytest.mark.parametrize(
    ("options", "kind", "stopped"),
    [
        (["--radius", 0.1], "radius", "radius"),
        (["--tolerance", 0.2], "tolerance", "tolerance"),
        (["--tolerance", 0.1, "--bound", "two-sided"], "tolerance", "tolerance"),
        (["--bound", "soft", "--beta", 4], "fixed", "n"),
        (["--mode", "predict"], "fixed", "n"),
    ],
)
def test_every_plan_is_reached_from_the_command_line(options: list[object], kind: str, stopped: str) -> None:
    result = macer("predict", SHIP, "--n", 1500, "--json", *options)
    assert result.exit_code == 0, result.output
    certificate = json.loads(result.stdout)["certificate"]
    assert (certificate["label"], certificate["stopped"]) == ("ship", stopped)
    assert certificate["plan"]["kind"] == kind
    assert certificate["n"] < 1500 or stopped == "n"
    assert (certificate["radius"] > 0) == ("predict" not in options)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["predict", "no-such-file.png"], 8, "No such file"),
        (["predict", __file__], 8, "not an image"),
        (["predict", SHIP, "--checkpoint", "nowhere"], 3, "not a checkpoint"),
        (["predict", SHIP, "--checkpoint", "bundled:nowhere"], 3, "bundled:cifar10"),
        (["predict", SHIP, "--alpha", "0.7"], 2, "alpha"),
        (["predict", SHIP, "--n", "0"], 2, "n must lie"),
        (["predict", SHIP, "--radius", "0.5", "--tolerance", "0.1"], 2, "two plans: give one of them"),
        (["predict", SHIP, "--tolerance", "-1"], 2, "tolerance must lie"),
        (["predict", SHIP, "--mode", "predict", "--radius", "0.5"], 2, "predict takes n and alpha only"),
        (["predict", SHIP, "--device", "tpu"], 2, "'cpu', 'cuda', 'tensorrt'"),
        (["certify", "bundled:cifar10", "--dataset", "cifar10", "--data-dir", ".", "--out", "x"], 4, "--download"),
        (["certify", "bundled:cifar10", "--dataset", "imagenet", "--data-dir", ".", "--out", "x"], 4, "ImageFolder"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: list[object], exit_code: int, message: str) -> None:
    result = macer(*arguments)
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A photograph of each of the bundled checkpoint's classes, laid out as ImageFolder."""
    rng = np.random.default_rng(0)
    for name in load_config("bundled:cifar10").classes:
        folder = tmp_path / "tree" / "val" / name
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "0.JPEG")
    return tmp_path / "tree"


def test_certify_continues_an_interrupted_log_to_the_same_rows(tree: Path, tmp_path: Path) -> None:
    def certify(out: Path, *more: object) -> Result:
        where = ("--dataset", "imagenet", "--data-dir", tree, "--out", out)
        return macer("certify", "bundled:cifar10", *where, "--n", 300, *more)

    whole, pieces = tmp_path / "whole.tsv", tmp_path / "pieces.tsv"
    assert certify(whole, "--stop", 4).exit_code == 0
    assert certify(pieces, "--stop", 4).exit_code == 0
    lines = pieces.read_text().splitlines(keepends=True)
    pieces.write_text("".join(lines[:3]) + "2\t2\t")  # a crash in the middle of the third row
    result = certify(pieces, "--stop", 4)
    assert result.exit_code == 0, result.output

    def content(path: Path) -> list[tuple[object, ...]]:
        return [(r.idx, r.predict, r.radius, r.p_lower, r.count_a, r.top) for r in read_log(path).rows]

    assert content(pieces) == content(whole)
    assert [row.idx for row in read_log(whole).rows] == [0, 1, 2, 3]
    settings = read_log(whole).settings
    assert (settings["dataset"], settings["sigma"], settings["n"], settings["alpha"]) == ("imagenet", 0.25, 300, 0.001)
    for option, value in (("--alpha", 0.01), ("--radius", 0.5), ("--bound", "two-sided")):
        refused = certify(pieces, option, value)
        assert refused.exit_code == 5
        assert option.removeprefix("--") in refused.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--start", 10], "the data set has 10 images, 0 to 9: none starts at 10"),
        (["--start", 20_000], "none starts at 20,000"),
        (["--start", 10, "--stop", 5], "none starts at 10"),
        (["--start", 5, "--stop", 3], "must stop above its start, 5, not at 3"),
        (["--start", 5, "--stop", 5], "must stop above its start, 5, not at 5"),
        (["--stop", 0], "must stop above its start, 0, not at 0"),
        (["--start", 9, "--stop", 9, "--every", 3], "must stop above its start, 9, not at 9"),
        (["--start", 10, "--every", 2], "none starts at 10"),
        (["--start", 10, "--stop", 20], "none starts at 10"),
        (["--start", 2**40], "none starts at 1,099,511,627,776"),
        (["--start", -1], "'--start'"),
        (["--every", 0], "'--every'"),
    ],
)
def test_a_range_without_images_is_an_error(tree: Path, tmp_path: Path, options: list[object], words: str) -> None:
    out = tmp_path / "log.tsv"
    result = macer("certify", "bundled:cifar10", "--dataset", "imagenet", "--data-dir", tree, "--out", out, *options)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not list(tmp_path.glob("log.tsv*"))


def test_ranges_of_images() -> None:
    assert image_indices(10) == range(10)
    assert image_indices(10, start=9) == range(9, 10)
    assert image_indices(10, stop=20, every=3) == range(0, 10, 3), "up to the last image"
    assert image_indices(10, start=4, stop=5, every=7) == range(4, 5, 7)
    with pytest.raises(ParameterError, match="every must be at least 1, not 0"):
        image_indices(10, every=0)
    with pytest.raises(ParameterError, match="none starts at -1"):
        image_indices(10, start=-1)


def test_a_log_that_cannot_be_continued_names_the_option(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "log.tsv"
    out.write_text("my own notes\n")
    where = ("--dataset", "imagenet", "--data-dir", tree, "--out", out)
    result = macer("certify", "bundled:cifar10", *where, "--engine", "torch", "--no-compile", "--stop", 1)
    assert result.exit_code == 5, result.output
    assert result.stderr.endswith("(--out)\n")
    assert out.read_text() == "my own notes\n"


def test_a_tree_of_other_classes_is_not_certified(tree: Path, tmp_path: Path) -> None:
    (tree / "val" / "frog").rename(tree / "val" / "gnu")
    out = tmp_path / "log.tsv"
    result = macer("certify", "bundled:cifar10", "--dataset", "imagenet", "--data-dir", tree, "--out", out)
    assert result.exit_code == 2, result.output
    assert (
        "class 6 of cifar10 is 'frog', of imagenet 'gnu': the checkpoint was trained on other classes" in result.stderr
    )
    assert not out.exists()


def test_the_bundled_checkpoint_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in (BUNDLED / "cifar10").iterdir()}
    assert set(files) == {"config.json", "model.int8.onnx", "model.safetensors"}
    assert sum(files.values()) < 10 * 2**20
