"""Evaluation and training sets by name: where they lie, what their images look like, how to get them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from macer_serve.class_names import class_names
from macer_serve.errors import DataError, ParameterError, UploadError

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What a data set's name stands for. `mean`, `std` are per channel, of pixel values in [0, 1]."""

    name: str
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None
    layout: str
    flip: bool = False
    crop_padding: int = 0
    downloadable: bool = False

    @property
    def is_tree(self) -> bool:
        """Whether it is a folder a class, read as it is needed, rather than one array."""
        return self.layout is _TREE


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TREE = (
    "{root}/train/<class>/*.JPEG and {root}/val/<class>/*.JPEG (or PNG, WebP), one folder a class "
    "(torchvision's ImageFolder; also accepted with a folder of the data set's name in between)"
)

DATASETS: dict[str, DatasetInfo] = {
    "cifar10": DatasetInfo(
        "cifar10",
        (3, 32, 32),
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        resize=32,
        layout="{root}/cifar-10-batches-py/ with data_batch_1 ... data_batch_5, test_batch, batches.meta",
        flip=True,
        crop_padding=4,
        downloadable=True,
    ),
    "mnist": DatasetInfo(
        "mnist",
        (1, 28, 28),
        (0.0,),
        (1.0,),
        resize=28,
        layout="{root}/MNIST/raw/ with the four idx files (train-images-idx3-ubyte, ...)",
        downloadable=True,
    ),
    "svhn": DatasetInfo(
        "svhn",
        (3, 32, 32),
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        resize=32,
        layout="{root}/train_32x32.mat and {root}/test_32x32.mat",
        crop_padding=4,
        downloadable=True,
    ),
    "imagenet": DatasetInfo(
        "imagenet", (3, 224, 224), _IMAGENET_MEAN, _IMAGENET_STD, resize=256, layout=_TREE, flip=True
    ),
    "folder": DatasetInfo("folder", (3, 224, 224), _IMAGENET_MEAN, _IMAGENET_STD, resize=256, layout=_TREE, flip=True),
}


def dataset_info(name: str) -> DatasetInfo:
    """The entry of `DATASETS`; raises `ParameterError` for an unknown name."""
    try:
        return DATASETS[name]
    except KeyError:
        raise ParameterError(f"unknown data set {name!r}; choose one of: {', '.join(sorted(DATASETS))}") from None


class ImageSet(Sequence[tuple[npt.NDArray[np.uint8], int]]):
    """Decoded images `uint8 [height, width, channels]` with their labels, in the data set's own order.

    Image files are read by the decoder of uploads, with its default limits. Raises `DataError` for one it refuses.
    `folders` is what the classes are called on disk; the same as `classes` where they have no other names.
    """

    def __init__(
        self, info: DatasetInfo, source: Any, classes: tuple[str, ...], folders: tuple[str, ...] | None = None
    ) -> None:
        self.info = info
        self.classes = classes
        self.folders = classes if folders is None else folders
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        image, label = self.source[index]
        pixels = np.asarray(image, dtype=np.uint8)
        return (pixels[:, :, None] if pixels.ndim == 2 else pixels), int(label)

    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None:
        """All images `uint8 [N, height, width, channels]` and labels `int64 [N]`; None for a tree of files."""
        data = getattr(self.source, "data", None)
        if data is None:
            return None
        images = np.asarray(data, dtype=np.uint8)
        if images.ndim == 3:
            images = images[..., None]
        return np.ascontiguousarray(images), np.asarray(self.source.targets, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Arrays:
    """Images `uint8 [N, height, width, channels]` in memory, as torchvision's CIFAR-10 holds them."""

    data: npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        return self.data[index], int(self.targets[index])


def _missing(info: DatasetInfo, root: Path) -> DataError:
    advice = f"{info.name} is not under {root}, or not whole there. Expected layout: {info.layout.format(root=root)}."
    if info.downloadable:
        advice += " To fetch it there, add --download."
    else:
        advice += " It cannot be downloaded for you: lay it out there, or name another --data-dir."
    return DataError(advice)


def _tree(info: DatasetInfo, root: Path, split: Split) -> Path:
    folder = "train" if split == "train" else "val"
    for candidate in (root / folder, root / info.name / folder):
        if candidate.is_dir():
            return candidate
    raise _missing(info, root)


def load_dataset(name: str, root: str | Path, split: Split, *, download: bool = False) -> ImageSet:
    """The named split from `root`; raises `DataError` (with the layout needed) where it is not there."""
    info = dataset_info(name)
    root = Path(root)
    if download and not info.downloadable:
        raise DataError(f"{name} cannot be downloaded; expected layout: {info.layout.format(root=root)}")
    from torchvision import datasets

    if info.is_tree:
        tree = _tree(info, root, split)
        try:
            folder = datasets.ImageFolder(str(tree), loader=read_image)
        except FileNotFoundError as error:
            raise DataError(f"{tree}: {error}") from error
        names = class_names(folder.classes, (tree.parent, root, root / name))
        return ImageSet(info, folder, names, tuple(folder.classes))
    try:
        if name == "svhn":
            digits = datasets.SVHN(str(root), split, download=download)
            pixels = np.ascontiguousarray(digits.data.transpose(0, 2, 3, 1))
            return ImageSet(info, _Arrays(pixels, digits.labels.astype(np.int64)), tuple("0123456789"))
        kind = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST}[name]
        source: Any = kind(str(root), train=split == "train", download=download)
        whole = len(source.data) == len(source.targets)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not download:
            raise _missing(info, root) from error
        reason = " ".join(str(error).split())
        raise DataError(f"{name} could not be read or fetched under {root}: {reason}") from error
    except Exception:  # torchvision parses idx files by assertions and slices
        whole = False
    if not whole:
        raise DataError(f"{name} under {root} is damaged; remove its files and fetch them again (--download)")
    classes = tuple(str(c).split(" - ")[0] for c in source.classes)
    return ImageSet(info, source, classes)


def read_image(path: str | Path) -> npt.NDArray[np.uint8]:
    """Returns a file's pixels, uint8 `[height, width, 3]`, RGB, as the decoder of uploads does.

    Raises `DataError`, which names the file, for what the decoder refuses.
    """
    from macer_serve.images import DEFAULT_LIMITS  # here, since `macer --help` loads this module and needs no Pillow
    from macer_serve.inputs import pixels_of

    try:
        return pixels_of(path, DEFAULT_LIMITS)
    except UploadError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise DataError(f"{path}: unreadable image ({reason}); remove or replace it") from error
