"""CIFAR-10 (Krizhevsky 2009): 32 x 32 photographs of ten classes."""

from __future__ import annotations

from pathlib import Path

from macer_serve.datasets.base import Arrays, DatasetInfo, Split


def _read(root: Path, split: Split, download: bool) -> tuple[Arrays, tuple[str, ...]]:
    from torchvision.datasets import CIFAR10

    source = CIFAR10(str(root), train=split == "train", download=download)
    return source, tuple(source.classes)


DATASET = DatasetInfo(
    "cifar10",
    "CIFAR-10",
    (3, 32, 32),
    (0.4914, 0.4822, 0.4465),
    (0.2023, 0.1994, 0.2010),
    resize=32,
    layout="{root}/cifar-10-batches-py/ with data_batch_1 ... data_batch_5, test_batch, batches.meta",
    architecture="resnet110",
    read=_read,
    first_files=("cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"),
    flip=True,
    crop_padding=4,
)
