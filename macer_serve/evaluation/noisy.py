"""Noisy copies of the images of a data set, as a base classifier sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from macer_serve.datasets import ImageSet
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.noise import as_pixels


def noisy_copies(
    classifier: SmoothedClassifier,
    images: ImageSet,
    indices: Iterable[int],
    *,
    progress: Callable[[], object] = lambda: None,
) -> npt.NDArray[np.float32]:
    """Returns one noisy copy per image, `[k, C, H, W]`, pixel values; the classifier's secret fixes the noise."""
    copies = []
    for idx in indices:
        pixels, _ = images[idx]
        asked = classifier.question(pixels)
        copies.append(classifier.noise.sample(asked.x, asked.seed, "selection", 0, 1)[0])
        progress()
    return as_pixels(np.stack(copies), classifier.noise.scale)
