"""Trees of image files, one folder per class: which files count, and what is wrong with a folder.

Imports neither torch nor Pillow, so that a wrong folder is named at once.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from macer_serve.errors import DataError

# The file types that torchvision's ImageFolder lists. The decoder refuses some of them, by name.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_NAMED_AT_MOST = 10  # class folders, in a message


@dataclass(frozen=True, slots=True)
class ImageTree:
    """The images of a tree: `samples` are paths with the index of their class folder in `classes`."""

    folder: Path
    classes: tuple[str, ...]
    samples: tuple[tuple[str, int], ...]

    def divided(self, share: float, part: Literal["train", "test"]) -> ImageTree:
        """Returns one part of the tree, `share` of each class's images being the test part.

        The digest of an image's path below the tree decides its part, so that the parts do not depend on the place of
        the tree, and hardly on other images. Each class has at least one image in each part. Raises `DataError` for a
        class of one image.
        """
        by_class: list[list[tuple[str, int]]] = [[] for _ in self.classes]
        for path, label in self.samples:
            by_class[label].append((path, label))
        if single := [name for name, own in zip(self.classes, by_class, strict=True) if len(own) < 2]:
            raise DataError(f"{self.folder} cannot be divided: {_listed(single)} hold one image; add more, or a val/")
        test: set[str] = set()
        for own in by_class:
            count = min(max(1, round(share * len(own))), len(own) - 1)
            test.update(sorted((path for path, _ in own), key=self._draw)[:count])
        kept = tuple(sample for sample in self.samples if (sample[0] in test) == (part == "test"))
        return ImageTree(self.folder, self.classes, kept)

    def _draw(self, path: str) -> bytes:
        below = Path(path).relative_to(self.folder).as_posix()
        return hashlib.sha256(below.encode(errors="surrogateescape")).digest()


def read_tree(folder: Path) -> ImageTree:
    """Returns the images of a folder with one folder per class, in torchvision's order.

    Skips names that begin with a dot, and `__MACOSX`. Raises `DataError` if there is no class folder, or a class
    folder without images.
    """
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if _counts(entry.name))
        classes = tuple(name for name in entries if (folder / name).is_dir())
        found = {name: list(_files(folder / name)) for name in classes}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    if not classes:
        loose = sum(name.lower().endswith(SUFFIXES) for name in entries)
        what = f"{loose} images lie in it directly" if loose else "it is empty" if not entries else "it has only files"
        raise DataError(f"{folder} has no class folders, {what}; put the images of each class in a folder of its name")
    samples = {name: [path for path in found[name] if path.lower().endswith(SUFFIXES)] for name in classes}
    if empty := [name for name in classes if not samples[name]]:
        others = Counter(os.path.splitext(path)[1].lower() or "no suffix" for name in empty for path in found[name])
        there = f" (other files there: {', '.join(f'{n} {suffix}' for suffix, n in others.most_common(3))})"
        raise DataError(
            f"{folder} has class folders without images: {_listed(empty)}{there if others else ''}; "
            f"images are files of the types {' '.join(SUFFIXES)}. Fill these folders or remove them"
        )
    labelled = tuple((path, label) for label, name in enumerate(classes) for path in samples[name])
    return ImageTree(folder, classes, labelled)


def _counts(name: str) -> bool:
    """Whether a name is the user's own: editors, operating systems and archives leave the others."""
    return not name.startswith(".") and name != "__MACOSX"


def _files(folder: Path) -> Iterator[str]:
    """The files at all depths of a class folder, links to folders followed once."""
    seen: set[str] = set()
    walked = []
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else filter(_counts, folders)
        if real not in seen:
            walked.append((place, files))
        seen.add(real)
    for place, files in sorted(walked):
        yield from (os.path.join(place, name) for name in sorted(filter(_counts, files)))


def _raise(error: OSError) -> None:
    raise error


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
