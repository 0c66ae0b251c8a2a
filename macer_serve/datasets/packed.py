"""A packed training set: images that were decoded and resized beforehand, in one file that is mapped into memory.

PACK/
├── pack.json     what it was made from (`PackInfo`)
├── index.npy     int64 [N, 4]: the place of an image's first byte, its height, its width, its label
├── pixels.u8     uint8 [height, width, 3] of each image, one after another
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from macer_serve.datasets.base import ImageSet
from macer_serve.datasets.table import dataset_info
from macer_serve.errors import DataError

INFO, INDEX, PIXELS = "pack.json", "index.npy", "pixels.u8"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class PackInfo:
    """What a pack was made from. `source` is a digest of every file's path, label and contents, and of `short_side`.

    Images whose short side exceeded `short_side` pixels were resized to it.
    """

    dataset: str
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    short_side: int
    images: int
    source: str
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PackedImages:
    """The images of a pack, as views of the mapped file. Processes that are started later map the file themselves."""

    def __init__(self, folder: Path, index: npt.NDArray[np.int64]) -> None:
        self.folder, self.index = folder, index
        self._pixels: npt.NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "index": self.index, "_pixels": None}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> tuple[npt.NDArray[np.uint8], int]:
        if self._pixels is None:
            # Copy on write: torch warns of arrays that cannot be written to. The file is never changed.
            self._pixels = np.memmap(self.folder / PIXELS, dtype=np.uint8, mode="c")
        first, height, width, label = self.index[number].tolist()
        return self._pixels[first : first + height * width * 3].reshape(height, width, 3), label


def load_pack(folder: str | Path, dataset: str) -> tuple[ImageSet, PackInfo]:
    """Returns the images of a pack of the named data set, and what it was made from.

    Raises `DataError` for a folder that is no whole pack, or one of another data set.
    """
    folder = Path(folder)
    try:
        read = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if read["schema"] != SCHEMA:
            raise DataError(f"{folder} was packed by another version; pack the data set again", settings=("packed",))
        info = PackInfo(**{**read, "classes": tuple(read["classes"]), "folders": tuple(read["folders"])})
        index = np.load(folder / INDEX, allow_pickle=False)
        size = (folder / PIXELS).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} is no pack of a data set, or not a whole one ({error}); make it by macer pack",
            settings=("packed",),
        ) from error
    if info.dataset != dataset:
        raise DataError(f"{folder} is a pack of {info.dataset}, not of {dataset}", settings=("packed", "dataset"))
    ends = index[:, 0] + 3 * index[:, 1] * index[:, 2] if index.ndim == 2 and index.shape[1] == 4 else np.zeros(0)
    labels_fit = len(ends) and bool(((index[:, 3] >= 0) & (index[:, 3] < len(info.classes))).all())
    if len(ends) != info.images or not labels_fit or int(ends[-1]) != size or bool((index[1:, 0] != ends[:-1]).any()):
        raise DataError(f"{folder} is damaged: its files do not fit each other; pack the data set again")
    return ImageSet(dataset_info(dataset), PackedImages(folder, index), info.classes, info.folders), info
