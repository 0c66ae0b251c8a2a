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
from macer_serve.image_tree import ImageTree, read_tree

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What a data set's name stands for. `mean`, `std` are per channel, of pixel values in [0, 1].

    `is_tree` says that the data set is a tree of files, one folder per class, read when needed. The others are arrays
    in memory; `first_files` names a file of their training split and one of their test split.
    """

    name: str
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None
    layout: str
    flip: bool = False
    crop_padding: int = 0
    is_tree: bool = False
    first_files: tuple[str, str] = ("", "")

    @property
    def downloadable(self) -> bool:
        return not self.is_tree


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
        first_files=("cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"),
    ),
    "mnist": DatasetInfo(
        "mnist",
        (1, 28, 28),
        (0.0,),
        (1.0,),
        resize=28,
        layout="{root}/MNIST/raw/ with the four idx files (train-images-idx3-ubyte, ...)",
        first_files=("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-images-idx3-ubyte"),
    ),
    "svhn": DatasetInfo(
        "svhn",
        (3, 32, 32),
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        resize=32,
        layout="{root}/train_32x32.mat and {root}/test_32x32.mat",
        crop_padding=4,
        first_files=("train_32x32.mat", "test_32x32.mat"),
    ),
    "imagenet": DatasetInfo(
        "imagenet", (3, 224, 224), _IMAGENET_MEAN, _IMAGENET_STD, resize=256, layout=_TREE, flip=True, is_tree=True
    ),
    "folder": DatasetInfo(
        "folder", (3, 224, 224), _IMAGENET_MEAN, _IMAGENET_STD, resize=256, layout=_TREE, flip=True, is_tree=True
    ),
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


@dataclass(frozen=True, slots=True)
class _Files:
    """Images of a tree, each decoded when it is asked for."""

    samples: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        path, label = self.samples[index]
        return read_image(path), label


def _missing(info: DatasetInfo, root: Path) -> DataError:
    advice = f"{info.name} is not under {root}, or not whole there. Expected layout: {info.layout.format(root=root)}."
    if info.downloadable:
        return DataError(f"{advice} It can be downloaded.", settings=("download",))
    return DataError(
        f"{advice} It cannot be downloaded for you: lay it out there, or name another folder.", settings=("data_dir",)
    )


def _tree(info: DatasetInfo, root: Path, split: Split, share: float | None) -> ImageTree:
    """Returns the images of a split; with a `share`, that of a tree without a test split of its own."""
    places = (root, root / info.name)
    if share is None:
        folder = "train" if split == "train" else "val"
        if found := [place / folder for place in places if (place / folder).is_dir()]:
            return read_tree(found[0])
        if split == "test" and (found := [place / "train" for place in places if (place / "train").is_dir()]):
            raise DataError(
                f"there is no val/ beside {found[0]}, and the test images are read from there. Make one with the same "
                "class folders, or set a part of the training images aside, such as 0.1 of them.",
                settings=("split",),
            )
        raise _missing(info, root)
    if not 0 < share < 1:
        raise ParameterError(
            f"the part set aside must lie between 0 and 1, such as 0.1, not {share:g}", settings=("split",)
        )
    if own := [place / "val" for place in places if (place / "val").is_dir()]:
        raise DataError(
            f"{own[0]} holds the test images; a part is set aside only if there is no val/", settings=("split",)
        )
    found = [place / "train" for place in places if (place / "train").is_dir()] or [root]
    if not found[0].is_dir():
        raise _missing(info, root)
    return read_tree(found[0]).divided(share, split)


def require_present(
    name: str, root: str | Path, split: Split, *, download: bool = False, share: float | None = None
) -> None:
    """Raises `DataError` if `load_dataset` would not find the split. Imports no torch, so it answers at once."""
    info = dataset_info(name)
    if info.is_tree:
        load_dataset(name, root, split, download=download, share=share)
    elif share is not None:
        raise ParameterError(
            f"a part is set aside of folders of images only; {name} has a test split of its own", settings=("split",)
        )
    elif not download and not (Path(root) / info.first_files[split == "test"]).is_file():
        raise _missing(info, Path(root))


def load_dataset(
    name: str, root: str | Path, split: Split, *, download: bool = False, share: float | None = None
) -> ImageSet:
    """Returns the named split of the data set under `root`.

    `share` divides a tree that has no test split of its own; it is the part of each class's images that is set aside
    for tests. Raises `DataError` with the layout needed if the data are not there.
    """
    info = dataset_info(name)
    root = Path(root)
    if download and not info.downloadable:
        raise DataError(f"{name} cannot be downloaded; expected layout: {info.layout.format(root=root)}")
    if info.is_tree:
        tree = _tree(info, root, split, share)
        names = class_names(tree.classes, (tree.folder.parent, root, root / name))
        return ImageSet(info, _Files(tree.samples), names, tree.classes)
    if share is not None:
        raise ParameterError(
            f"a part is set aside of folders of images only; {name} has a test split of its own", settings=("split",)
        )
    from torchvision import datasets

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
        raise DataError(
            f"{name} under {root} is damaged; remove its files and fetch them again", settings=("download",)
        )
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
