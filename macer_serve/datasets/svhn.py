"""SVHN (Netzer et al. 2011): 32 x 32 photographs of house numbers, ten digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from macer_serve.datasets.base import Arrays, DatasetInfo, MemoryArrays, Split


def _read(root: Path, split: Split, download: bool) -> tuple[Arrays, tuple[str, ...]]:
    from torchvision.datasets import SVHN

    digits = SVHN(str(root), split, download=download)
    pixels = np.ascontiguousarray(digits.data.transpose(0, 2, 3, 1))
    return MemoryArrays(pixels, digits.labels.astype(np.int64)), tuple("0123456789")


DATASET = DatasetInfo(
    "svhn",
    "SVHN",
    (3, 32, 32),
    (0.4377, 0.4438, 0.4728),
    (0.1980, 0.2010, 0.1970),
    resize=32,
    layout="{root}/train_32x32.mat and {root}/test_32x32.mat",
    architecture="resnet110",
    read=_read,
    first_files=("train_32x32.mat", "test_32x32.mat"),
    crop_padding=4,
    like="cifar10",
)
