"""Data sets are found where torchvision lays them out, or the message says what should lie where."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

from macer_serve.class_names import class_names
from macer_serve.datasets import DATASETS, Split, dataset_info, load_dataset
from macer_serve.errors import DataError, ParameterError
from macer_serve.images import DEFAULT_LIMITS

SPLITS: tuple[Split, ...] = ("train", "test")


@pytest.fixture
def full() -> Path:
    """The folder of the full data sets, or a skip."""
    if "MACER_DATA_DIR" not in os.environ:
        pytest.skip("MACER_DATA_DIR does not name a folder with the full data sets")
    return Path(os.environ["MACER_DATA_DIR"])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for index, name in enumerate(("n02", "n01")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = np.full((20, 30, 3), 10 * index + number, np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


def write_mnist(root: Path, images: int = 3, labels: int = 3) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(images * 784, dtype=np.uint32).astype(np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, images, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, labels) + bytes(range(labels)))
    return root


def test_an_unknown_name_lists_the_known() -> None:
    known = "cifar10, folder, imagenet, mnist, svhn"
    with pytest.raises(ParameterError, match=f"unknown data set 'celeba'; choose one of: {known}"):
        dataset_info("celeba")


@pytest.mark.parametrize("name", DATASETS)
def test_what_a_name_stands_for(name: str) -> None:
    info = DATASETS[name]
    assert info.name == name
    assert len(info.mean) == len(info.std) == info.input_shape[0]
    assert info.resize is not None
    assert info.resize >= max(info.input_shape[1:])
    assert (name in ("cifar10", "svhn")) == (info.crop_padding == 4)
    assert (name in ("mnist", "svhn")) == (not info.flip), "a digit seen in a mirror is another sign"


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("split", SPLITS)
def test_missing_data_says_what_should_lie_where(tmp_path: Path, name: str, split: Split) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name, tmp_path, split)
    message = str(caught.value)
    assert f"{name} is not under {tmp_path}" in message
    assert DATASETS[name].layout.format(root=tmp_path) in message
    assert str(tmp_path) in DATASETS[name].layout.format(root=tmp_path)
    assert ("download" in caught.value.settings) == DATASETS[name].downloadable
    assert not list(tmp_path.iterdir()), "looking changes nothing"


def test_imagenet_is_never_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imagenet cannot be downloaded; expected layout: .*train/<class>"):
        load_dataset("imagenet", tmp_path, "train", download=True)


def test_svhn_comes_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .mat file of its layout: X [32, 32, 3, N], y 1..10 where 10 stands for the digit 0."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
    file = tmp_path / "train_32x32.mat"
    scipy.io.savemat(file, {"X": pixels, "y": np.array([[1], [2], [10], [9], [10], [3], [4]])})
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "train", ["unused", file.name, digest])
    images = load_dataset("svhn", tmp_path, "train")
    assert images.classes == tuple("0123456789")
    assert [label for _, label in images] == [1, 2, 0, 9, 0, 3, 4]
    arrays = images.arrays()
    assert arrays is not None
    for i in range(7):
        assert (images[i][0] == pixels[..., i]).all()
        assert (arrays[0][i] == pixels[..., i]).all()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="svhn is not under"):
        load_dataset("svhn", tmp_path, "train")


@pytest.mark.parametrize("name", ["imagenet", "folder"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("below", [False, True])
def test_a_tree_is_found_directly_and_below_its_name(tree: Path, split: Split, below: bool, name: str) -> None:
    if below:
        (tree / name).mkdir()
        for folder in ("train", "val"):
            shutil.move(tree / folder, tree / name / folder)
    images = load_dataset(name, tree, split)
    assert images.classes == ("n01", "n02"), "sorted by name"
    assert len(images) == 4
    assert images.arrays() is None
    assert [label for _, label in images] == [0, 0, 1, 1]
    pixels, _ = images[0]
    assert pixels.shape == (20, 30, 3)
    assert (pixels == 10).all(), "n01 was written second"


def test_a_tree_with_an_empty_class_is_refused(tree: Path) -> None:
    (tree / "train" / "n03").mkdir()
    with pytest.raises(DataError, match="n03"):
        load_dataset("imagenet", tree, "train")


def test_an_unreadable_image_is_named(tree: Path) -> None:
    broken = tree / "val" / "n01" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    images = load_dataset("imagenet", tree, "test")
    with pytest.raises(DataError, match=r"n01/0\.png: unreadable image .*remove or replace it"):
        images[0]


def test_files_that_no_server_would_take_are_named(tree: Path) -> None:
    """Of another type, of too many bytes or pixels, or not readable: what is measured could not be served."""
    folder = tree / "val" / "n01"
    Image.new("RGB", (5, 4)).save(folder / "0.bmp")
    (folder / "1.png").write_bytes(bytes(DEFAULT_LIMITS.bytes + 1))
    Image.new("1", (5001, 5000)).save(folder / "2.png")
    (folder / "3.png").symlink_to("nowhere")
    images = load_dataset("imagenet", tree, "test")
    paths = [path for path, _ in images.source.samples[:5]]
    assert paths == [f"{folder / name}" for name in ("0.bmp", "0.png", "1.png", "2.png", "3.png")]
    reasons = {0: "BMP is not accepted", 2: "bytes; send at most", 3: "pixels; send at most", 4: "No such file"}
    for index, reason in reasons.items():
        expected = re.escape(f"{paths[index]}: unreadable image (") + f".*{reason}.*; remove or replace it"
        with pytest.raises(DataError, match=expected) as caught:
            images[index]
        assert str(caught.value).count(str(folder)) == 1


def test_grey_and_palette_images_become_three_channels(tree: Path) -> None:
    for number, mode in enumerate(("L", "P")):
        Image.new(mode, (5, 4)).save(tree / "val" / "n01" / f"{number}.png")
    images = load_dataset("imagenet", tree, "test")
    assert [images[i][0].shape for i in range(2)] == [(4, 5, 3)] * 2


NAMES = {
    "LOC_synset_mapping.txt": "n01 tench, Tinca tinca\nn02 great white shark, white shark\n",
    "words.txt": "n00\tentity\nn02\tgreat white shark, white shark\r\nn01\ttench, Tinca tinca",
    "imagenet_classes.txt": "\ufeff0\tn01\ttench\n1\tn02\tgreat_white_shark\n\n",
}


@pytest.mark.parametrize("file", NAMES)
@pytest.mark.parametrize("where", [".", "imagenet"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_file_of_names_beside_a_tree_names_its_classes(tree: Path, split: Split, where: str, file: str) -> None:
    (tree / where).mkdir(exist_ok=True)
    (tree / where / file).write_text(NAMES[file], encoding="utf-8", newline="")
    images = load_dataset("imagenet", tree, split)
    assert images.classes == ("tench", "great white shark"), "in the order of the folders, not of the file"
    assert images.folders == ("n01", "n02")
    assert [label for _, label in images] == [0, 0, 1, 1]


def test_names_are_found_next_to_a_tree_below_its_name_before_the_root(tree: Path) -> None:
    for folder in ("train", "val"):
        shutil.move(tree / folder, tree / "imagenet" / folder)
    (tree / "words.txt").write_text("n01\tfar\n")
    assert load_dataset("imagenet", tree, "test").classes == ("far", "n02")
    (tree / "imagenet" / "words.txt").write_text("n01\tnear\n")
    assert load_dataset("imagenet", tree, "test").classes == ("near", "n02")


def test_names_that_several_classes_share_are_told_apart(tmp_path: Path) -> None:
    """ImageNet's cranes; a folder that the file does not know keeps its name, even if it is another's."""
    (tmp_path / "words.txt").write_text("n01\tcrane\nn02\tcrane\nn03\theron\nn04\tegret, heron\n")
    folders = ["n01", "n02", "n03", "n04", "egret"]
    names = class_names(folders, [tmp_path])
    assert names == ("crane (n01)", "crane (n02)", "heron", "egret (n04)", "egret")
    assert class_names(folders[1:4], [tmp_path]) == ("crane", "heron", "egret")


def test_without_a_file_the_folder_is_the_name(tree: Path) -> None:
    images = load_dataset("imagenet", tree, "train")
    assert images.classes == images.folders == ("n01", "n02")


@pytest.mark.parametrize(
    ("file", "damaged", "line"),
    [
        ("LOC_synset_mapping.txt", "n01 tench\nn02\n", 2),
        ("words.txt", "n01 tench, Tinca tinca\n", 1),
        ("words.txt", "n01\ttench\n\nn02\t, white shark\n", 3),
        ("words.txt", "n01\ttench\nn01\tgoldfish\n", 2),
        ("words.txt", "n01\tt\xeanch\n", 1),
        ("imagenet_classes.txt", "tench\ngoldfish\n", 1),
        ("imagenet_classes.txt", "0\tn01\ttench\none\tn02\tgoldfish\n", 2),
    ],
)
def test_a_damaged_file_of_names_is_refused_with_its_line(tree: Path, file: str, damaged: str, line: int) -> None:
    (tree / file).write_text(damaged, encoding="latin-1")
    with pytest.raises(DataError, match=rf"{tree / file}, line {line}: .*repair or remove the file"):
        load_dataset("imagenet", tree, "train")


@pytest.mark.skipif("MACER_SHARED_DATA" not in os.environ, reason="MACER_SHARED_DATA names no folder with the lists")
def test_published_lists_give_every_class_a_name_of_its_own(tmp_path: Path) -> None:
    for file, shared in (("imagenet_classes.txt", "imagenet_classes.txt"), ("words.txt", "tiny_words.txt")):
        text = (Path(os.environ["MACER_SHARED_DATA"]) / shared).read_text()
        (tmp_path / file).write_text(text)
        folders = sorted(re.findall(r"\bn[0-9]{8}\b", text))
        names = class_names(folders, [tmp_path])
        assert len(set(names)) == len(folders) in (200, 1000)
        assert names[folders.index("n01443537")] == "goldfish"
        (tmp_path / file).unlink()
        if len(folders) == 1000:
            assert {n for n in names if "(" in n} == {
                "crane (n02012849)", "crane (n03126707)", "maillot (n03710637)", "maillot (n03710721)"
            }  # fmt: skip


def test_mnist_from_idx_files(tmp_path: Path) -> None:
    images = load_dataset("mnist", write_mnist(tmp_path), "test")
    assert images.classes == tuple("0123456789")
    arrays = images.arrays()
    assert arrays is not None
    assert arrays[0].shape == (3, 28, 28, 1)
    assert arrays[1].tolist() == [0, 1, 2]
    for index, (pixels, label) in enumerate(images):
        assert np.array_equal(pixels, arrays[0][index])
        assert label == arrays[1][index]


@pytest.mark.parametrize("kept", [0, 3, 10, 500])
def test_damaged_idx_files_are_refused(tmp_path: Path, kept: int) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="mnist"):
        load_dataset("mnist", tmp_path, "train")


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="damaged; remove its files and fetch them again"):
        load_dataset("mnist", write_mnist(tmp_path, images=3, labels=2), "train")


def test_altered_cifar_files_are_refused(tmp_path: Path) -> None:
    """torchvision unpickles them: a file that is not the published one must not get that far."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch altered'\ntR.")
    with pytest.raises(DataError, match=r"cifar10 is not under .*, or not whole there.*can be downloaded"):
        load_dataset("cifar10", tmp_path, "train")


@pytest.mark.data
@pytest.mark.parametrize(("split", "size", "first"), [("train", 50_000, [6, 9, 9, 4, 1]), ("test", 10_000, [3, 8, 8])])
def test_full_cifar10(full: Path, split: Split, size: int, first: list[int]) -> None:
    images = load_dataset("cifar10", full, split)
    arrays = images.arrays()
    assert arrays is not None
    assert arrays[0].shape == (size, 32, 32, 3)
    assert arrays[1][: len(first)].tolist() == first
    assert np.bincount(arrays[1]).tolist() == [size // 10] * 10
    assert images.classes[:4] == ("airplane", "automobile", "bird", "cat")
    pixels, label = images[0]
    assert np.array_equal(pixels, arrays[0][0])
    assert label == first[0]
    info = images.info
    if split == "train":
        assert (arrays[0] / 255).mean((0, 1, 2)) == pytest.approx(info.mean, abs=1e-3)


@pytest.mark.data
@pytest.mark.parametrize(("split", "size", "first"), [("train", 60_000, [5, 0, 4, 1, 9]), ("test", 10_000, [7, 2, 1])])
def test_full_mnist(full: Path, split: Split, size: int, first: list[int]) -> None:
    images = load_dataset("mnist", full, split)
    arrays = images.arrays()
    assert arrays is not None
    assert arrays[0].shape == (size, 28, 28, 1)
    assert arrays[1][: len(first)].tolist() == first
    assert images.classes == tuple("0123456789")
    assert images[0][0].shape == (28, 28, 1)
