"""A packed training set: the decoder's pixels, resized; resumed; refused where it does not fit; trained on."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from macer_serve.cli import main
from macer_serve.datasets import load_dataset, packing
from macer_serve.datasets.packed import PIXELS, load_pack
from macer_serve.errors import DataError, MacerError, OutputError, ParameterError


def packed(
    tree: Path, out: Path, short_side: int = 16, progress: Callable[[int, int], None] = lambda d, t: None
) -> Any:
    return packing.pack(load_dataset("folder", tree, "train"), tree, out, short_side=short_side, progress=progress)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_pack_holds_the_decoders_pixels_resized(tree: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 30, 3), np.uint8)).save(tree / "train" / "ant" / "small.png")
    info = packed(tree, tmp_path / "pack")
    images, read = load_pack(tmp_path / "pack", "folder")
    files = load_dataset("folder", tree, "train")
    assert (read, images.classes, len(images)) == (info, files.classes, len(files))
    for (pixels, label), (whole, expected) in zip(images, files, strict=True):
        assert label == expected
        if whole.shape[0] == 9:
            assert np.array_equal(pixels, whole), "smaller images stay as they are"
        else:
            assert pixels.shape == (16, 19, 3)
            small = Image.fromarray(whole).resize((19, 16), Image.Resampling.BILINEAR)
            assert np.array_equal(pixels, np.asarray(small))
    copied = pickle.loads(pickle.dumps(images.source))
    assert np.array_equal(copied[3][0], images[3][0])


@pytest.mark.parametrize("torn", [b"", b'["train/ant'])
def test_a_stopped_pack_goes_on_and_is_the_same(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    monkeypatch.setattr(packing, "_AT_ONCE", 4)
    whole = packed(tree, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(tree, tmp_path / "pack", progress=stop)
    partial = tmp_path / ".pack.partial"
    with (partial / packing.JOURNAL).open("ab") as journal:
        journal.write(torn)
    with (partial / PIXELS).open("ab") as pixels:
        pixels.write(b"pixels of an image that is not in the journal")
    seen: list[int] = []
    assert packed(tree, tmp_path / "pack", progress=lambda done, total: seen.append(done)) == whole
    assert seen[0] == 8
    assert contents(tmp_path / "pack") == contents(tmp_path / "whole")
    assert not partial.exists()


def test_a_file_that_changed_is_packed_anew(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_AT_ONCE", 4)
    (tree / "train" / "bee" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="unreadable image"):
        packed(tree, tmp_path / "pack")
    Image.fromarray(np.full((40, 48, 3), 7, np.uint8)).save(tree / "train" / "bee" / "3.png")
    Image.fromarray(np.full((40, 48, 3), 9, np.uint8)).save(tree / "train" / "ant" / "1.png")
    first: list[int] = []
    packed(tree, tmp_path / "pack", progress=lambda done, total: first.append(done))
    images, _ = load_pack(tmp_path / "pack", "folder")
    assert first[0] == 1, "the images before the one that changed"
    assert (images[1][0] == 9).all()
    assert (images[8][0] == 7).all()


def test_what_cannot_be_packed_is_refused(
    tree: Path, mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(tree, tmp_path / "pack")
    with pytest.raises(OutputError, match="there already"):
        packed(tree, tmp_path / "pack")
    with pytest.raises(ParameterError, match="at least 8 pixels"):
        packed(tree, tmp_path / "other", short_side=4)
    with pytest.raises(DataError, match="only trees"):
        packing.pack(load_dataset("mnist", mnist, "train"), mnist, tmp_path / "m", short_side=16, progress=print)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(packing, "_AT_ONCE", 4)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="GiB more"):
        packed(tree, tmp_path / "other")


@pytest.mark.parametrize("damage", ["cut", "index", "json", "labels", "schema", "dataset", "missing"])
def test_a_damaged_or_foreign_pack_is_refused(tree: Path, tmp_path: Path, damage: str) -> None:
    packed(tree, out := tmp_path / "pack")
    info = json.loads((out / "pack.json").read_text())
    index = np.load(out / "index.npy")
    if damage == "cut":
        (out / PIXELS).write_bytes((out / PIXELS).read_bytes()[:-1])
    elif damage == "index":
        index[3, 0] += 3
    elif damage == "labels":
        index[3, 3] = 3
    elif damage == "json":
        (out / "pack.json").write_text("{")
    elif damage == "missing":
        (out / "index.npy").unlink()
    else:
        (out / "pack.json").write_text(json.dumps({**info, damage: 9 if damage == "schema" else "imagenet"}))
    if damage in ("index", "labels"):
        np.save(out / "index.npy", index)
    with pytest.raises(MacerError, match=r"damaged|no pack|another version|a pack of imagenet"):
        load_pack(out, "folder")


def test_training_reads_a_pack_without_the_files_and_records_it(
    tree: Path, train: Callable[..., Result], tmp_path: Path
) -> None:
    result = CliRunner().invoke(
        main,
        ["pack", "--dataset", "folder", "--data-dir", str(tree), "--out", str(tmp_path / "pack"), "--short-side", "32"],
    )
    assert result.exit_code == 0, result.output
    assert "15 images" in result.output
    (tree / "train").rename(tree / "elsewhere")
    options = ("--dataset", "folder", "--data-dir", tree, "--packed", tmp_path / "pack", "--arch", "lenet")
    options += ("--method", "gaussian", "--epochs", 1, "--loaders", 1, "--out", tmp_path / "out")
    result = train(*options, "--size", 28)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["recipe"]["packed"] == load_pack(tmp_path / "pack", "folder")[1].source
    refused = train(*options, "--size", 40)
    assert refused.exit_code == 4
    assert "short side of 32 pixels" in refused.output
