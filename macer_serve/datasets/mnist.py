"""MNIST (LeCun et al. 1998): 28 x 28 handwritten digits."""

from __future__ import annotations

from pathlib import Path

from macer_serve.datasets.base import Arrays, DatasetInfo, Split


def _read(root: Path, split: Split, download: bool) -> tuple[Arrays, tuple[str, ...]]:
    from torchvision.datasets import MNIST

    source = MNIST(str(root), train=split == "train", download=download)
    return source, tuple(name.split(" - ")[0] for name in source.classes)


DATASET = DatasetInfo(
    "mnist",
    "MNIST",
    (1, 28, 28),
    (0.0,),
    (1.0,),
    resize=28,
    layout="{root}/MNIST/raw/ with the four idx files (train-images-idx3-ubyte, ...)",
    architecture="lenet",
    read=_read,
    first_files=("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-images-idx3-ubyte"),
)
