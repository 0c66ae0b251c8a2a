"""What a data set is: what its images look like, where they lie, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Split = Literal["train", "test"]


class Arrays(Protocol):
    """All images of a split in memory: `data`, uint8 `[N, height, width(, channels)]`, and their labels `targets`."""

    @property
    def data(self) -> Any: ...

    @property
    def targets(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What a data set's name stands for. `mean` and `std` are per channel, of pixel values in [0, 1].

    `read(root, split, download)` returns the images of a split and the names of their classes. If `read` is None, the
    data set is a tree of files, one folder per class, each read when it is needed. `first_files` names a file of the
    training split and one of the test split, which `read` needs. `architecture` is the network that is trained by
    default. `like` names the data set whose recipes are taken, if none are published for this one.
    """

    name: str
    title: str
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int
    layout: str
    architecture: str
    read: Callable[[Path, Split, bool], tuple[Arrays, tuple[str, ...]]] | None = None
    first_files: tuple[str, str] = ("", "")
    flip: bool = False
    crop_padding: int = 0
    like: str | None = None

    @property
    def is_tree(self) -> bool:
        """Whether the data set is a tree of files."""
        return self.read is None

    @property
    def downloadable(self) -> bool:
        """Whether torchvision can fetch the data set."""
        return not self.is_tree


class ImageSet(Sequence[tuple[npt.NDArray[np.uint8], int]]):
    """Decoded images `uint8 [height, width, channels]` with their labels, in the data set's own order.

    Image files are read by the decoder of uploads, with its default limits. Raises `UnreadableImageError` for a file
    that the decoder refuses.
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

    def reduced(self, index: int, reduction: Callable[[int, int], int]) -> tuple[npt.NDArray[np.uint8], int]:
        """Returns an image for training, and its label.

        `reduction` is called once, with the height and width of the whole image. A JPEG file is decoded at the size
        divided by what it returns: 1, 2, 4 or 8. Other images come whole.
        """
        if hasattr(self.source, "reduced"):
            pixels, label = self.source.reduced(index, reduction)
            return pixels, int(label)
        pixels, label = self[index]
        reduction(*pixels.shape[:2])
        return pixels, label

    def label(self, index: int) -> int:
        """Returns the label of an image, which need not be decodable."""
        return int(self.source.targets[index])

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
class MemoryArrays:
    """Images `uint8 [N, height, width, channels]` in memory, as torchvision's CIFAR-10 holds them."""

    data: npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        return self.data[index], int(self.targets[index])
