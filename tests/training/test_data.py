"""Every batch can be made again from (seed, epoch, step), and augmentation moves pixels without changing them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from image_files import hundreds_of_files
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from macer_serve.datasets import DATASETS, ImageSet, load_dataset
from macer_serve.errors import DataError
from macer_serve.images import Reduction, decode
from macer_serve.training.data import Batches, DeviceBatches, TreeBatches, generator_for

CPU = torch.device("cpu")


class _Source(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.data)


def numbered(count: int, dataset: str, size: tuple[int, int] = (6, 7)) -> tuple[ImageSet, npt.NDArray[np.uint8]]:
    """Images of random pixels, none zero, whose label is their number."""
    channels = DATASETS[dataset].input_shape[0]
    pixels = np.random.default_rng(0).integers(1, 256, (count, *size, channels), dtype=np.uint8)
    data = pixels[..., 0] if channels == 1 else pixels
    return ImageSet(DATASETS[dataset], _Source(data=data, targets=list(range(count))), ("a", "b")), pixels


def batches_of(images: ImageSet, *, batch: int = 4, seed: int = 0, limit: int | None = None) -> DeviceBatches:
    return DeviceBatches(images, batch=batch, seed=seed, device=CPU, limit=limit)


def whole_epoch(batches: Batches, epoch: int, first_step: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels, _ in batches.epoch(epoch, first_step)]


def assert_same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> None:
    assert len(one) == len(other)
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_augmented_pixels_are_shifted_and_flipped_ones() -> None:
    images, pixels = numbered(50, "cifar10")
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    seen: Counter[tuple[int, int, bool]] = Counter()
    for epoch in range(60):
        for batch, labels, _ in batches_of(images, batch=16).epoch(epoch, 0):
            assert batch.dtype == torch.float32
            assert batch.is_contiguous(memory_format=torch.channels_last)
            made = np.rint(batch.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
            assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), made.astype(np.float32) / 255)
            for one, label in zip(made, labels.tolist(), strict=True):
                found = []
                for row in range(9):
                    for col in range(9):
                        crop = padded[label, row : row + 6, col : col + 7]
                        found += [(row, col, False)] * np.array_equal(one, crop)
                        found += [(row, col, True)] * np.array_equal(one, crop[:, ::-1])
                assert len(found) == 1, "exactly one shift and flip explains an image of random pixels"
                seen[found[0]] += 1
    assert len(seen) == 2 * 81, "3,000 draws miss one of 162 with probability 1e-6"
    assert 1300 < sum(count for (_, _, flipped), count in seen.items() if flipped) < 1700  # +-7 standard deviations


def test_digits_are_neither_flipped_nor_moved() -> None:
    images, pixels = numbered(10, "mnist")
    for epoch in range(5):
        for batch, labels, _ in batches_of(images).epoch(epoch, 0):
            expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)[labels]
            assert torch.equal(batch, expected)


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (12, 4), (3, 4), (9, 4), (5, 1)])
def test_an_epoch_is_each_image_once(count: int, batch: int) -> None:
    images, _ = numbered(count, "cifar10")
    batches = batches_of(images, batch=batch)
    for epoch in range(3):
        labels = [labels for _, labels, _ in batches.epoch(epoch, 0)]
        assert len(labels) == batches.steps_per_epoch == -(-count // batch)
        assert [len(part) for part in labels[:-1]] == [batch] * (len(labels) - 1)
        assert sorted(torch.cat(labels).tolist()) == list(range(count)) == list(range(batches.images_per_epoch))


def test_any_step_can_be_made_again() -> None:
    images, _ = numbered(10, "cifar10")
    undisturbed = [whole_epoch(batches_of(images), epoch) for epoch in range(3)]
    for epoch in reversed(range(3)):
        torch.manual_seed(epoch)  # the global generator plays no part
        for first_step in range(4):
            assert_same(whole_epoch(batches_of(images), epoch, first_step), undisturbed[epoch][first_step:])


def test_epochs_and_seeds_differ_in_order_and_augmentation() -> None:
    images, _ = numbered(40, "cifar10")
    runs = [whole_epoch(batches_of(images, seed=seed), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    orders = {tuple(torch.cat([labels for _, labels in run]).tolist()) for run in runs}
    assert len(orders) == 3
    # By image, whatever its place in the order:
    made = [torch.cat([b for b, _ in run])[torch.cat([labels for _, labels in run]).argsort()] for run in runs]
    for one, other in ((0, 1), (0, 2)):
        same = sum(torch.equal(a, b) for a, b in zip(made[one], made[other], strict=True))
        assert same <= 3, "two draws agree with probability 1/162"


def test_a_limit_is_the_head_of_an_array() -> None:
    images, _ = numbered(10, "cifar10")
    labels = torch.cat([labels for _, labels, _ in batches_of(images, limit=6).epoch(0, 0)])
    assert sorted(labels.tolist()) == list(range(6))
    assert batches_of(images, limit=99).images_per_epoch == 10


def test_generators_are_their_address() -> None:
    def draw(*address: int | str) -> float:
        return torch.rand((), generator=generator_for("cpu", *address)).item()

    assert draw(0, "noise", 1, 2) == draw(0, "noise", 1, 2)
    addresses: list[tuple[int | str, ...]] = [
        (seed, name, epoch, step)
        for seed in (0, 1, 11)
        for name in ("noise", "augment")
        for epoch in (0, 1, 11)
        for step in (0, 1, 11)
    ]
    assert len({draw(*address) for address in addresses}) == len(addresses)


def tree_batches(tree: Path, *, loaders: int = 0, **options: Any) -> TreeBatches:
    defaults: dict[str, Any] = {"size": 16, "batch": 4, "seed": 0, "limit": None}
    return TreeBatches(load_dataset("imagenet", tree, "train"), device=CPU, loaders=loaders, **{**defaults, **options})


def test_tree_batches_do_not_depend_on_the_loaders(tree: Path) -> None:
    for epoch in range(2):
        undisturbed = whole_epoch(tree_batches(tree), epoch)
        assert [len(labels) for _, labels in undisturbed] == [4, 4, 4, 3]
        for first_step, loaders in ((0, 2), (1, 0), (2, 2), (3, 0)):
            made = whole_epoch(tree_batches(tree, loaders=loaders), epoch, first_step)
            assert_same(made, undisturbed[first_step:])


def test_tree_batches_are_augmented_images_with_their_labels(tree: Path) -> None:
    epochs = [whole_epoch(tree_batches(tree), epoch) for epoch in range(2)]
    for epoch in epochs:
        for images, labels in epoch:
            assert images.shape == (len(labels), 3, 16, 16)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.min() >= 0
            assert 0.5 < images.max() <= 1
            assert torch.equal(images.mean((2, 3)).argmax(1), labels), "each class has its colour"
        assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == [0] * 5 + [1] * 5 + [2] * 5
    means = [sorted(images.mean((1, 2, 3)).tolist()) for images in (torch.cat([i for i, _ in e]) for e in epochs)]
    assert means[0] != means[1], "another epoch, another crop"


@pytest.mark.filterwarnings("ignore:::PIL")
def test_augmentation_begins_with_the_pixels_that_uploads_have(tmp_path: Path) -> None:
    """Orientation, bit depth, transparency and all: a network is trained on what it will be served."""
    files = dict(hundreds_of_files())
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "train" / "a" / name).write_bytes(data)
    batches = tree_batches(tmp_path)
    for index, name in enumerate(sorted(files)):
        height, width = decode(files[name]).shape[:2]
        whole = {"scale": (1, 1), "ratio": (width / height, width / height)}
        batches.data.crop, batches.data.flip = v2.RandomResizedCrop((height, width), **whole), v2.Identity()
        item = batches.data[0, index]
        assert not isinstance(item, DataError)
        assert np.array_equal(item[0].permute(1, 2, 0).numpy(), decode(files[name])), name


@pytest.mark.parametrize(("kind", "orientation"), [("JPEG", 1), ("JPEG", 6), ("PNG", 1)])
def test_a_reduced_photograph_has_nearly_the_pixels_of_the_whole_one(
    tmp_path: Path, kind: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG is decoded no finer than the crop needs and no coarser; other files come whole."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(96, 160, (9, 12, 3), np.uint8)).resize((1203, 901), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth.save(tmp_path / "train" / "a" / f"1.{kind.lower()}", kind, quality=95, exif=exif)
    data = tree_batches(tmp_path, size=64).data
    whole, label = data.images[0]
    heights: list[int] = []

    def reduced(index: int, reduction: Reduction) -> tuple[Any, int]:
        pixels, label = ImageSet.reduced(data.images, index, reduction)
        heights.append(pixels.shape[0])
        return pixels, label

    def unreduced(index: int, reduction: Reduction) -> tuple[Any, int]:
        reduction(*whole.shape[:2])
        return whole, label

    made = []
    for read in (reduced, unreduced):
        monkeypatch.setattr(data.images, "reduced", read)
        made.append([data[epoch, 0] for epoch in range(40)])
    for one, other in zip(*made, strict=True):
        assert not isinstance(one, DataError)
        assert not isinstance(other, DataError)
        assert one[0].shape == other[0].shape == (3, 64, 64)
        assert (one[0].float() - other[0].float()).abs().mean() < 3, "of 64 grey levels that the image spans"
    assert {round(whole.shape[0] / height) for height in heights} == ({4, 8} if kind == "JPEG" else {1})


@pytest.mark.parametrize("limit", [3, 8, 10, 14])
def test_a_limit_is_spread_over_the_classes_of_a_tree(tree: Path, limit: int) -> None:
    batches = tree_batches(tree, limit=limit)
    labels = torch.cat([labels for _, labels, _ in batches.epoch(0, 0)])
    assert len(labels) == batches.images_per_epoch == limit
    counts = labels.bincount(minlength=3)
    assert counts.max() - counts.min() <= 1
    assert len(set(batches.indices.tolist())) == limit


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def damage_text(path: Path) -> None:
    path.write_text("not an image")


def damage_chunk(path: Path) -> None:
    """A chunk whose name is no name, on which Pillow raises SyntaxError, not OSError."""
    data = path.read_bytes()
    at = data.index(b"IDAT")
    path.write_bytes(data[: at - 4] + b"\0\0\0\0\1\2\3\4" + data[at + 4 :])


@pytest.mark.parametrize("damage", [damage_truncated, damage_text, damage_chunk])
@pytest.mark.parametrize("loaders", [0, 2])
def test_an_unreadable_image_is_reported_by_its_path(tree: Path, damage: Any, loaders: int) -> None:
    broken = tree / "train" / "bee" / "3.png"
    damage(broken)
    with pytest.raises(DataError) as caught:
        whole_epoch(tree_batches(tree, loaders=loaders), 0)
    message = str(caught.value)
    assert message.startswith(f"{broken}: unreadable image")
    assert "\n" not in message
    assert "remove or replace it" in message


@pytest.mark.parametrize("loaders", [0, 2])
def test_the_command_reports_an_unreadable_image_without_a_traceback(tree: Path, train: Any, loaders: int) -> None:
    broken = tree / "train" / "bee" / "3.png"
    damage_truncated(broken)
    options = ("--dataset", "imagenet", "--data-dir", tree, "--size", 32, "--arch", "lenet", "--batch", 4)
    result = train(*options, "--out", tree / "out", "--epochs", 1, "--k", 1, "--loaders", loaders)
    assert result.exit_code == 4
    assert f"  {broken}: unreadable image" in result.output
    assert "Traceback" not in result.output
    assert not (tree / "out").exists()


def test_a_tree_is_not_an_array(tree: Path) -> None:
    with pytest.raises(DataError, match="imagenet is a tree of files"):
        batches_of(load_dataset("imagenet", tree, "train"))


def test_padding_is_zero() -> None:
    """Black, not the nearest or the mean pixel."""
    images, _ = numbered(30, "cifar10")
    white = ImageSet(
        replace(images.info, flip=False),
        _Source(data=np.full((30, 6, 7, 3), 255, np.uint8), targets=list(range(30))),
        ("a", "b"),
    )
    values = torch.cat([batch.flatten() for batch, _, _ in batches_of(white).epoch(0, 0)])
    assert set(values.unique().tolist()) == {0.0, 1.0}
