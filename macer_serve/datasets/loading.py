"""Reads a data set by its name from the folder where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from macer_serve.class_names import class_names
from macer_serve.datasets.base import DatasetInfo, ImageSet, Split
from macer_serve.datasets.table import dataset_info
from macer_serve.errors import DataError, ParameterError, UnreadableImageError, UploadError
from macer_serve.image_tree import ImageTree, read_tree

if TYPE_CHECKING:
    from macer_serve.images import Reduction


@dataclass(frozen=True, slots=True)
class _Files:
    """Images of a tree, each decoded when it is asked for."""

    samples: tuple[tuple[str, int], ...]

    @property
    def targets(self) -> tuple[int, ...]:
        """The labels, in the order of the samples."""
        return tuple(label for _, label in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        return self.reduced(index, None)

    def reduced(self, index: int, reduction: Reduction | None) -> tuple[npt.NDArray[np.uint8], int]:
        """Returns an image and its label; a JPEG decoded by the divisor that `reduction` returns for its size."""
        path, label = self.samples[index]
        return read_image(path, reduction), label


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
    if info.read is None:
        tree = _tree(info, root, split, share)
        names = class_names(tree.classes, (tree.folder.parent, root, root / name))
        return ImageSet(info, _Files(tree.samples), names, tree.classes)
    if share is not None:
        raise ParameterError(
            f"a part is set aside of folders of images only; {name} has a test split of its own", settings=("split",)
        )
    whole = False
    try:
        source, classes = info.read(root, split, download)
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
    return ImageSet(info, source, classes)


def read_image(path: str | Path, reduction: Reduction | None = None) -> npt.NDArray[np.uint8]:
    """Returns a file's pixels, uint8 `[height, width, 3]`, RGB, as the decoder of uploads does.

    A `reduction`, for training only, lets a JPEG be decoded at a part of its size (`images.decode`).

    Raises `UnreadableImageError`, which names the file, for what the decoder refuses, and `DataError` for a file that
    cannot be read at all.
    """
    from macer_serve.images import DEFAULT_LIMITS  # here, since `macer --help` loads this module and needs no Pillow
    from macer_serve.inputs import of_file

    try:
        return of_file(str(path), DEFAULT_LIMITS, reduction)
    except UploadError as error:
        reason = str(error).removeprefix(f"{path}: ")
        kind = DataError if isinstance(error.__cause__, OSError) else UnreadableImageError
        raise kind(f"{path}: unreadable image ({reason}); remove or replace it") from error
