"""A check of imported checkpoints: the accuracy on noisy copies of a few labelled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binom

from macer_serve.datasets import read_image
from macer_serve.errors import DataError
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import Task

# An accuracy is near chance if chance explains it with more than this probability, or if it closes less than this share
# of the gap between chance and certainty. Networks with a wrong normalisation are often a little better than chance.
SIGNIFICANCE, GAP = 0.001, 0.1


@dataclass(frozen=True, slots=True)
class NoisyAccuracy:
    """How many of the `images` noisy copies are `correct`. `chance` is the share of the most frequent label."""

    correct: int
    images: int
    chance: float

    @property
    def share(self) -> float:
        return self.correct / self.images

    @property
    def near_chance(self) -> bool:
        """Whether the network is hardly better than a guess. A wrong normalisation or order of classes causes this."""
        significant = float(binom.sf(self.correct - 1, self.images, self.chance)) < SIGNIFICANCE
        return not significant or self.share < self.chance + GAP * (1.0 - self.chance)


def labelled_images(folder: str | Path, classes: tuple[str, ...], limit: int) -> list[tuple[Path, int]]:
    """Returns up to `limit` images with their labels, spread evenly, out of one folder per class.

    Folders are named after the classes. If they are not, there must be one for each class, in alphabetical order, as
    in torchvision's ImageFolder. Raises `DataError` for any other folder, and if there are no images.
    """
    root = Path(folder)
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    names = [path.name for path in folders]
    if set(names) <= set(classes):
        labels = [classes.index(name) for name in names]
    elif len(names) == len(classes):
        labels = list(range(len(names)))
    else:
        strange = sorted(set(names) - set(classes))
        raise DataError(f"{root}: its folders are not the network's classes, for example {', '.join(strange[:3])}")
    found = [
        (path, label)
        for where, label in zip(folders, labels, strict=True)
        for path in sorted(where.iterdir())
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    ]
    if not found:
        raise DataError(f"{root} holds no images: expected a folder per class with PNG, JPEG or WebP files")
    return [found[i * len(found) // limit] for i in range(limit)] if len(found) > limit else found


def noisy_accuracy(
    g: SmoothedClassifier, images: list[tuple[Path, int]], *, progress: Callable[[], object] = lambda: None
) -> NoisyAccuracy:
    """Returns how often the base classifier names an image's label on one noisy copy of it.

    Raises `DataError` for a file that is no acceptable image.
    """
    assert g.voter is not None
    correct, size = 0, g.voter.batch_sizes[-1]
    for at in range(0, len(images), size):
        some = images[at : at + size]
        asked = [g.question(read_image(path)) for path, _ in some]
        votes = g.voter.submit([Task(q.x, q.seed, Draw("selection", 0, 1)) for q in asked]).result()
        for (_, label), vote in zip(some, votes, strict=True):
            correct += int(vote.argmax()) == label
            progress()
    labels = [label for _, label in images]
    most = max(labels.count(label) for label in set(labels)) / len(labels)
    return NoisyAccuracy(correct, len(images), most if len(set(labels)) > 1 else 1.0 / len(g.config.classes))
