"""Certifying the images of a data set: one row per image, written to a log that an interrupted run continues."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from macer_serve.datasets import ImageSet
from macer_serve.errors import ParameterError, UnreadableImageError
from macer_serve.evaluation.logs import ABSTAINED, UNDECODABLE, LogWriter, Row
from macer_serve.issuing import EvaluationSeed, Issuer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan

# Certifies images by their indices: one row each, in their order, when it is known.
Rows = Callable[[Sequence[int]], Iterable[Row]]

_log = logging.getLogger(__name__)


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


def issuer_of(seed: str, key: Path | None) -> EvaluationSeed | Issuer:
    """Returns whose noise is drawn: that of the owner of a private key file, or that of the seed's name.

    Raises `IssuerKeyError` for a file that holds no key.
    """
    return EvaluationSeed.named(seed) if key is None else Issuer.load(key)


def rows_of(classifier: SmoothedClassifier, images: ImageSet, plan: Plan) -> Rows:
    """Returns what certifies images in this process, one after the other."""
    return lambda indices: (certified_row(classifier, images, idx, plan) for idx in indices)


def write_rows(
    rows: Rows, indices: Sequence[int], log: LogWriter, *, progress: Callable[[Row], None] = lambda row: None
) -> None:
    """Certify the images that the log does not hold yet. `progress` is called with every new row."""
    for row in rows([idx for idx in indices if idx not in log.done]):
        log.write(row)
        progress(row)


def certified_row(classifier: SmoothedClassifier, images: ImageSet, idx: int, plan: Plan) -> Row:
    """Returns the log's row of one image. If the decoder refuses the image, the row is an abstention that says so."""
    started = time.perf_counter()
    try:
        pixels, label = images[idx]
    except UnreadableImageError as error:
        _log.warning("image %d counts as an abstention: %s", idx, error)
        seconds = time.perf_counter() - started
        return Row(idx, images.label(idx), ABSTAINED, 0.0, False, seconds, input_digest=UNDECODABLE)
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
        p_lower=certificate.p_lower if certificate.level == 0 else None,  # that of a group, not of class `top`
        n=certificate.n,
        count_a=votes[top],
        top=top,
        input_digest=certificate.input["digest"],
        level=certificate.level,
        group=certificate.group,
        group_radius=None if certificate.group is None else certificate.group_radius,
        group_correct=None if certificate.group is None else _holds(classifier, certificate, label),
    )


def _holds(classifier: SmoothedClassifier, certificate: Certificate, label: int) -> bool:
    """Returns whether the certified group holds the label."""
    hierarchy = classifier.config.hierarchy
    assert hierarchy is not None
    return label in dict(hierarchy.levels[certificate.level - 1])[str(certificate.group)]
