"""Certifying a data set: one row an image, streamed to a log that an interrupted run continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from macer_serve.datasets import ImageSet
from macer_serve.evaluation.logs import LogWriter, Row
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan


def image_indices(total: int, *, every: int = 1, start: int = 0, stop: int | None = None) -> range:
    """The indices start, start + every, ... below `stop`, all within a data set of `total` images."""
    return range(start, total if stop is None else min(stop, total), every)


def spread_indices(total: int, count: int) -> range:
    """Returns `count` indices spread evenly over a data set of `total` images, or all of them if there are fewer."""
    return image_indices(total, every=max(1, total // count))[:count]


def certify_dataset(
    classifier: SmoothedClassifier,
    images: ImageSet,
    indices: Iterable[int],
    plan: Plan,
    log: LogWriter,
    *,
    progress: Callable[[Row], None] = lambda row: None,
) -> None:
    """Certify the images that the log does not hold yet; `progress` sees every new row."""
    for idx in indices:
        if idx not in log.done:
            row = certified_row(classifier, images, idx, plan)
            log.write(row)
            progress(row)


def certified_row(classifier: SmoothedClassifier, images: ImageSet, idx: int, plan: Plan) -> Row:
    """The log's row of one image."""
    pixels, label = images[idx]
    started = time.perf_counter()
    certificate = classifier.certify(pixels, plan)
    seconds = time.perf_counter() - started
    votes = certificate.votes_by_class()
    top = certificate.class_id
    if top is None:  # which class was selected is of interest even where nothing is certified
        top = certificate.selected
    return Row(
        idx=idx,
        label=label,
        predict=-1 if certificate.class_id is None else certificate.class_id,
        radius=certificate.radius,
        correct=certificate.class_id == label,
        seconds=seconds,
        p_lower=certificate.p_lower,
        n=certificate.n,
        count_a=votes[top],
        top=top,
    )
