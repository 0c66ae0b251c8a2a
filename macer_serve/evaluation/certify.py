"""Certifying the images of a data set: one row per image, written to a log that an interrupted run continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from macer_serve.datasets import ImageSet
from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import ABSTAINED, LogWriter, Row
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan


def image_indices(total: int, *, every: int = 1, start: int = 0, stop: int | None = None) -> range:
    """Returns the indices start, start + every, ... below `stop` in a data set of `total` images.

    A `stop` beyond the last image means the last image. Raises `ParameterError` if no image lies in the range.
    """
    if not 0 <= start < total:
        raise ParameterError(f"the data set has {total:,} images, 0 to {total - 1:,}: none starts at {start:,}")
    if stop is not None and stop <= start:
        raise ParameterError(f"the range of images must stop above its start, {start:,}, not at {stop:,}")
    if every < 1:
        raise ParameterError(f"every must be at least 1, not {every}")
    return range(start, total if stop is None else min(stop, total), every)


def spread_indices(total: int, count: int) -> range:
    """Returns `count` indices spread evenly over a data set of `total` images, or all of them if there are fewer."""
    return range(0, total, max(1, total // count))[:count]


def certify_dataset(
    classifier: SmoothedClassifier,
    images: ImageSet,
    indices: Iterable[int],
    plan: Plan,
    log: LogWriter,
    *,
    progress: Callable[[Row], None] = lambda row: None,
) -> None:
    """Certify the images that the log does not hold yet. `progress` is called with every new row."""
    for idx in indices:
        if idx not in log.done:
            row = certified_row(classifier, images, idx, plan)
            log.write(row)
            progress(row)


def certified_row(classifier: SmoothedClassifier, images: ImageSet, idx: int, plan: Plan) -> Row:
    """Returns the log's row of one image."""
    pixels, label = images[idx]
    started = time.perf_counter()
    certificate = classifier.certify(pixels, plan)
    seconds = time.perf_counter() - started
    votes = certificate.votes_by_class()
    top = certificate.class_id
    if top is None:  # abstentions are analysed by the class that was selected
        top = certificate.selected
    return Row(
        idx=idx,
        label=label,
        predict=ABSTAINED if certificate.class_id is None else certificate.class_id,
        radius=certificate.radius,
        correct=certificate.class_id == label,
        seconds=seconds,
        p_lower=certificate.p_lower,
        n=certificate.n,
        count_a=votes[top],
        top=top,
    )
