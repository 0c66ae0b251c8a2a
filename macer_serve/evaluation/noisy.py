"""Noisy copies of the images of a data set, as a base classifier sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from macer_serve.datasets import ImageSet
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.noise import as_pixels
from macer_serve.smoothing.plan import Plan


def noisy_copies(
    classifier: SmoothedClassifier,
    images: ImageSet,
    indices: Iterable[int],
    *,
    progress: Callable[[], object] = lambda: None,
) -> npt.NDArray[np.float32]:
    """Returns one noisy copy per image, `[k, C, H, W]`, pixel values; the classifier's seeds fix the noise."""
    copies = []
    for idx in indices:
        pixels, _ = images[idx]
        model_input = classifier.model_input(pixels)
        seed = classifier.seed_proof(model_input, Plan()).seed
        copies.append(classifier.noise.sample(model_input.x, seed, "selection", 0, 1)[0])
        progress()
    return as_pixels(np.stack(copies), classifier.noise.scale)
