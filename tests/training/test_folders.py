"""Folders as people have them: what is not theirs is skipped, what is wrong is named before training."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from macer_serve.cli import main
from macer_serve.datasets import load_dataset
from macer_serve.errors import DataError
from macer_serve.image_tree import read_tree
from macer_serve.images import DEFAULT_LIMITS
from macer_serve.training.file_check import require_readable

Train = Callable[..., Result]
HOW = ("--dataset", "folder", "--method", "gaussian", "--arch", "resnet20", "--size", 32, "--batch", 4, "--loaders", 0)


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(shade).integers(0, 255, (34, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two classes of four pictures each, in two splits."""
    for split in ("train", "val"):
        for shade, name in enumerate(("cat", "dog")):
            for number in range(4):
                picture(tmp_path / "pets" / split / name / f"{number}.png", 10 * shade + number)
    return tmp_path / "pets"


# What editors, operating systems and archives leave behind, as paths below the folder of the data set.
STRANGERS = (
    "train/.ipynb_checkpoints/x.png",
    "train/__MACOSX/cat/._0.png",
    "train/.DS_Store",
    "train/cat/._0.png",
    "train/cat/.hidden.png",
    "train/cat/.thumbnails/0.png",
    "train/cat/__MACOSX/0.png",
    "train/cat/Thumbs.db",
    "train/cat/desktop.ini",
    "train/dog/notes.txt",
    "train/README.md",
    "val/.Trash-0/0.png",
    "val/__MACOSX/._val",
    "val/dog/._3.png",
    "val/.git/HEAD",
)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_not_the_users_is_skipped(pets: Path, stranger: str) -> None:
    before = [load_dataset("folder", pets, split).source.samples for split in ("train", "test")]
    (pets / stranger).parent.mkdir(parents=True, exist_ok=True)
    (pets / stranger).write_bytes(b"Mac OS X        ")
    images = [load_dataset("folder", pets, split) for split in ("train", "test")]
    assert [split.source.samples for split in images] == before
    assert all(split.classes == ("cat", "dog") for split in images)


def test_a_folder_with_all_of_them_trains(pets: Path, train: Train, tmp_path: Path) -> None:
    for stranger in STRANGERS:
        (pets / stranger).parent.mkdir(parents=True, exist_ok=True)
        (pets / stranger).write_bytes(b"Mac OS X        ")
    (pets / "train" / ".empty").mkdir()
    result = train(*HOW, "--data-dir", pets, "--epochs", 1, "--held-out", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["classes"] == ["cat", "dog"]
    assert json.loads((tmp_path / "out.run" / "log.jsonl").read_text())["images"] == 8


def test_folders_within_a_class_are_read_and_links_followed_once(pets: Path) -> None:
    picture(pets / "train" / "cat" / "more" / "a.JPG")
    (pets / "train" / "cat" / "again").symlink_to("more")
    (pets / "train" / "cat" / "more" / "up").symlink_to("..")
    names = [path.rpartition("/")[2] for path, label in read_tree(pets / "train").samples if label == 0]
    assert sorted(names) == ["0.png", "1.png", "2.png", "3.png", "a.JPG"]


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "bitmap":
        Image.new("RGB", (5, 4)).save(path, format="BMP")
    elif how == "animation":
        frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 200)]
        frames[0].save(path, format="PNG", save_all=True, append_images=frames[1:])
    elif how == "gone":
        path.unlink()
        path.symlink_to("nowhere")
    else:
        contents = {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"<html>404 Not Found</html>",
            "appledouble": b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ",
            "checksum": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
            "zeros": bytes(len(whole)),
            "large": bytes(DEFAULT_LIMITS.bytes + 1),
            "pdf": b"%PDF-1.7 ...",
            "gif": b"GIF89a" + whole,
        }
        path.write_bytes(contents[how])


DAMAGES = ("cut", "empty", "text", "appledouble", "checksum", "zeros", "large", "pdf", "gif", "bitmap", "animation")


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
def test_an_unreadable_picture_is_named_before_training_and_its_removal_is_enough(
    pets: Path, train: Train, tmp_path: Path, damage: str
) -> None:
    bad = pets / "train" / "dog" / "2.png"
    damaged(bad, damage)
    command = (*HOW, "--data-dir", pets, "--epochs", 1, "--out", tmp_path / "out")
    refused = train(*command)
    assert refused.exit_code == 4, refused.output
    assert "1 of 8 image files cannot be read" in refused.output
    assert f"{bad}: unreadable image" in refused.output
    assert not (tmp_path / "out.run").exists(), "nothing was begun"
    bad.unlink()
    result = train(*command)
    assert result.exit_code == 0, result.output


def test_all_unreadable_pictures_are_named_at_once_those_for_the_end_included(
    pets: Path, train: Train, tmp_path: Path
) -> None:
    bad = [pets / "train" / "cat" / "0.png", pets / "train" / "dog" / "3.png", pets / "val" / "cat" / "1.png"]
    for path in bad:
        path.write_text("no picture")
    command = (*HOW, "--data-dir", pets, "--epochs", 1, "--out", tmp_path / "out")
    refused = train(*command, "--held-out", 8)
    assert refused.exit_code == 4
    assert "3 of 16 image files" in refused.output
    assert all(str(path) in refused.output for path in bad)
    assert "2 of 8 image files" in train(*command).output, "test images are not needed then"
    assert "1 of 2 image files" in train(*command, "--limit", 2).output, "the first of each class"


def test_many_unreadable_pictures_are_counted(pets: Path) -> None:
    paths = []
    for number in range(300):
        paths.append(str(pets / "train" / "cat" / f"{number}.png"))
        Path(paths[-1]).write_text("no picture")
    seen: list[tuple[int, int]] = []
    with pytest.raises(DataError) as caught:
        require_readable(paths, progress=lambda done, total: seen.append((done, total)))
    assert "300 of 300 image files cannot be read" in str(caught.value)
    assert "and 280 more" in str(caught.value)
    assert seen == [(256, 300), (300, 300)]


def test_a_file_is_read_once_until_it_changes(pets: Path) -> None:
    paths = [path for path, _ in read_tree(pets / "train").samples]
    asked: list[int] = []

    def check() -> int:
        asked.clear()
        require_readable(paths, progress=lambda done, total: asked.append(total))
        return asked[0] if asked else 0

    assert [check(), check()] == [8, 0]
    picture(Path(paths[3]), shade=99)
    assert [check(), check()] == [1, 0]
    Path(paths[5]).write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 8"):
            check()
    cache = next((Path(os.environ["XDG_CACHE_HOME"]) / "macer-serve").glob("*"))
    cache.write_text("{" + cache.read_text()[5:])
    picture(Path(paths[5]))
    assert check() >= 1, "a damaged line is read over"


def test_without_a_cache_every_file_is_read(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    totals: list[int] = []
    for _ in range(2):
        paths = [path for path, _ in read_tree(pets / "val").samples]
        require_readable(paths, progress=lambda done, total: totals.append(total))
    assert totals == [8, 8]


@pytest.mark.parametrize("at", [(1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("removed", [1, 4])
def test_removing_pictures_leaves_the_saved_run_usable(
    pets: Path, train: Train, tmp_path: Path, removed: int, at: tuple[int, int]
) -> None:
    """A picture may become unreadable while a run is interrupted, at any state that it saved."""
    out = tmp_path / "out"
    command = (*HOW, "--data-dir", pets, "--epochs", 2, "--save-every", 1, "--keep", 9, "--out", out)
    assert train(*command).exit_code == 0
    shutil.rmtree(out)
    for state in (tmp_path / "out.run").glob("state-*"):
        if state.name > f"state-{at[0]:08d}-{at[1]:08d}.pt":
            state.unlink()
    for number in range(removed):
        (pets / "train" / "cat" / f"{number}.png").write_bytes(b"damaged")
    refused = train(*command)
    assert refused.exit_code == 4, refused.output
    assert "a run that was interrupted continues" in refused.output
    for number in range(removed):
        (pets / "train" / "cat" / f"{number}.png").unlink()
    if removed == 4:  # a class that is gone is another matter
        refused = train(*command)
        assert refused.exit_code == 4
        assert "class folders without images: cat" in refused.output
        return
    continued = train(*command)
    assert continued.exit_code == 0, continued.output
    assert f"began with 8 images, and there are now {8 - removed}" in continued.output or at[0] == 0
    log = [json.loads(line) for line in (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1]
    assert log[-1]["images"] == 8 - removed


def test_other_classes_do_not_continue_a_run(pets: Path, train: Train, tmp_path: Path) -> None:
    command = (*HOW, "--data-dir", pets, "--epochs", 1, "--out", tmp_path / "out")
    assert train(*command).exit_code == 0
    for split in ("train", "val"):
        (pets / split / "dog").rename(pets / split / "fox")
    refused = train(*command)
    assert refused.exit_code == 6
    assert "classes was ['cat', 'dog'], now ['cat', 'fox']" in refused.output


def arranged(pets: Path, how: str) -> None:
    """Puts a folder into one of the states in which people have them."""
    rooms, val = pets / "train", pets / "val"
    if how in ("one class", "one class, hidden folder"):
        for split in (rooms, val):
            shutil.rmtree(split / "dog")
        if "hidden" in how:
            (rooms / ".ipynb_checkpoints").mkdir()
    elif how == "empty class":
        (rooms / "emu").mkdir()
    elif how == "class of other files":
        (rooms / "emu").mkdir()
        (rooms / "emu" / "1.heic").write_bytes(b"x")
        (rooms / "emu" / "2.heic").write_bytes(b"x")
    elif how == "class of hidden files":
        (rooms / "emu").mkdir()
        (rooms / "emu" / "._1.png").write_bytes(b"x")
    elif how == "no classes":
        for path in [*rooms.glob("*/*")]:
            path.rename(rooms / f"{path.parent.name}-{path.name}")
        for folder in (rooms / "cat", rooms / "dog"):
            folder.rmdir()
    elif how == "empty train":
        shutil.rmtree(rooms)
        rooms.mkdir()
    elif how == "no train":
        shutil.rmtree(rooms)
    elif how == "no val":
        shutil.rmtree(val)
    elif how == "val lacks a class":
        shutil.rmtree(val / "dog")
    elif how == "val has another class":
        shutil.copytree(val / "dog", val / "fox")
    elif how == "val has an empty class":
        shutil.rmtree(val / "dog")
        (val / "dog").mkdir()
    elif how == "train is a file":
        shutil.rmtree(rooms)
        rooms.write_text("")


WRONG = {
    "one class": "are all of one class, cat; a classifier needs two or more",
    "one class, hidden folder": "are all of one class, cat; a classifier needs two or more",
    "empty class": "train has class folders without images: emu; images are files of the types .jpg",
    "class of other files": "without images: emu (other files there: 2 .heic)",
    "class of hidden files": "without images: emu;",
    "no classes": "train has no class folders, 8 images lie in it directly",
    "empty train": "train has no class folders, it is empty",
    "no train": "folder is not under",
    "train is a file": "folder is not under",
    "no val": "(--split, --held-out)",
    "val lacks a class": "(only in train: dog); without held-out images",
    "val has another class": "(only in test: fox)",
    "val has an empty class": "val has class folders without images: dog",
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_with_the_folder_is_said(pets: Path, train: Train, tmp_path: Path, how: str) -> None:
    arranged(pets, how)
    refused = train(*HOW, "--data-dir", pets, "--held-out", 4, "--out", tmp_path / "out")
    assert refused.exit_code == 4, refused.output
    assert WRONG[how] in refused.output
    assert str(pets) in refused.output or "test split" in refused.output
    assert "config.json" not in refused.output
    assert not list(tmp_path.glob("out*")), "nothing is left behind"


def test_the_folder_is_looked_for_before_torch_is_loaded(pets: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom macer_serve.cli import main\n"
        "main(['train', '--dataset', {name!r}, '--data-dir', {folder!r}])"
    )
    (tmp_path / "empty").mkdir()
    for name in ("folder", "imagenet", "cifar10", "svhn", "mnist"):
        command = code.format(name=name, folder=str(tmp_path / "empty"))
        result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
        assert result.returncode == 4, result.stderr
        assert f"{name} is not under {tmp_path / 'empty'}" in result.stderr
    (pets / "train" / "emu").mkdir()
    command = code.format(name="folder", folder=str(pets))
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 4
    assert "emu" in result.stderr


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_split_sets_the_same_images_aside_wherever_the_folder_lies(pets: Path, share: float, bare: bool) -> None:
    shutil.rmtree(pets / "val")
    for number in range(4, 20):
        picture(pets / "train" / "cat" / f"{number}.png", number)
    folder = pets.with_name("moved")
    if bare:
        shutil.copytree(pets / "train", folder)
    else:
        shutil.copytree(pets, folder)
    parts = {}
    for place in (pets, folder):
        sets = [load_dataset("folder", place, split, share=share) for split in ("train", "test")]
        assert all(part.classes == ("cat", "dog") for part in sets)
        names = [["/".join(Path(path).parts[-2:]) for path, _ in part.source.samples] for part in sets]
        assert not set(names[0]) & set(names[1])
        assert len(names[0]) + len(names[1]) == 24
        for name, count in (("cat", 20), ("dog", 4)):
            held = sum(path.startswith(name) for path in names[1])
            assert held == min(max(1, round(share * count)), count - 1)
        parts[place] = names
    assert parts[pets] == parts[folder]


def test_a_folder_without_val_is_trained_and_certified_by_one_split(pets: Path, train: Train, tmp_path: Path) -> None:
    shutil.rmtree(pets / "val")
    out, data = tmp_path / "out", ("--dataset", "folder", "--data-dir", pets, "--split", 0.25)
    command = (*HOW, *data, "--epochs", 1, "--held-out", 9, "--out", out)
    result = train(*command)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["split"] == 0.25
    assert config["metrics"]["images"] == 6
    assert config["metrics"]["held_out"]["images"] == "images 0-1"
    log = tmp_path / "log.tsv"
    certify = ["certify", out, *data, "--n", 100, "--out", log]
    done = CliRunner().invoke(main, [str(a) for a in certify])
    assert done.exit_code == 0, done.output
    assert "(2 images" in done.output
    other = train(*command, "--split", 0.5)
    assert other.exit_code == 6
    assert "split was 0.25, now 0.5" in other.output


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, "nan", "inf"])
def test_a_split_outside_its_range_is_refused(pets: Path, train: Train, tmp_path: Path, share: Any) -> None:
    shutil.rmtree(pets / "val")
    refused = train(*HOW, "--data-dir", pets, "--split", share, "--out", tmp_path / "out")
    assert refused.exit_code == 2, refused.output
    assert "must lie between 0 and 1" in refused.output


def test_a_split_where_there_is_nothing_to_divide_is_refused(
    pets: Path, train: Train, mnist: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out", "--split", 0.1)
    refused = train(*HOW, "--data-dir", pets, *out)
    assert (refused.exit_code, "val holds the test images" in refused.output) == (4, True)
    refused = train("--dataset", "mnist", "--data-dir", mnist, *out)
    assert (refused.exit_code, "mnist has a test split of its own" in refused.output) == (2, True)
    shutil.rmtree(pets / "val")
    for number in range(1, 4):
        (pets / "train" / "dog" / f"{number}.png").unlink()
    refused = train(*HOW, "--data-dir", pets, *out)
    assert (refused.exit_code, "dog hold one image" in refused.output) == (4, True)


def test_the_recipe_is_printed_as_a_table(mnist: Path, train: Train, tmp_path: Path) -> None:
    how = ("--dataset", "mnist", "--data-dir", mnist, "--sigma", 0.5, "--epochs", 1, "--k", 2)
    result = train(*how, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = [re.split("  +", line) for line in result.stderr.splitlines()[:20]]
    table = {words[0]: "  ".join(words[1:]) for words in lines}
    assert table["data set"] == "mnist"
    assert table["recipe"] == "published (public code of Jeong & Shin 2020)"
    assert table["method"] == "macer"
    assert table["sigma"] == "0.5"
    assert table["k"] == "2  (given)"
    assert table["lam"] == "16"
    assert table["milestones"] == "1, 1"
    assert table["nesterov"] == "no"
    assert "{" not in result.stderr
