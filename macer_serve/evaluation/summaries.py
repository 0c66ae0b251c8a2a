"""Figures of certification logs: ACR, certified accuracy, abstentions, time.

A wrong or abstained image counts as radius 0 in the ACR and is not certified at any radius. Certified accuracy at r is
the share of images that are correct with a radius of at least r. At r = 0 it is the share of images that are correct
and not abstained, as in published tables. Published logs print radii with three significant digits, rounded to nearest,
so that figures computed from these logs can exceed what was certified. `Summary.rounded_radii` says so. Logs of PREDICT
have no radii, and so no figure but the accuracy at r = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import ABSTAINED, Log, Settings

GRID_STEP = 0.25
GRID_LEAST, GRID_MOST = 0.75, 2.0
OUR_RADIUS_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class CertifiedAccuracy:
    """The share of images certified at `radius`, with the exact (Clopper-Pearson) 95 % interval of that share."""

    radius: float
    certified: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a log says about a smoothed classifier. Shares lie in [0, 1], radii are L2 in pixel values in [0, 1].

    `acr` is None for a log without radii, and `certified` then holds the accuracy at 0 only. `acr_error` is the
    standard error of the ACR, None for a single image. `votes_mean` is the mean number of estimation votes per image,
    None if the log does not say. `rounded_radii` says whether radii were printed with fewer than 6 decimals.

    Coarse answers count as `abstained`; `coarse` is their share. `coarse_certified` are the shares of images whose
    class or group is right with such a radius, empty if there are no coarse answers.
    """

    name: str
    image_set: str
    images: int
    acr: float | None
    acr_error: float | None
    certified: tuple[CertifiedAccuracy, ...]
    abstained: float
    seconds_mean: float
    seconds_median: float
    votes_mean: float | None
    rounded_radii: bool
    settings: Settings
    coarse: float = 0.0
    coarse_certified: tuple[CertifiedAccuracy, ...] = ()

    def at(self, radius: float) -> CertifiedAccuracy | None:
        """Returns the certified accuracy at a radius, or None if the log does not tell."""
        return next((at for at in self.certified if at.radius == radius), None)


def restrict(log: Log, start: int | None, stop: int | None) -> Log:
    """Returns the log with the rows with start <= idx < stop only. None is no limit."""
    first, end = start or 0, math.inf if stop is None else stop
    return replace(log, rows=tuple(row for row in log.rows if first <= row.idx < end))


def with_images(logs: Sequence[Log]) -> tuple[list[Log], list[str]]:
    """Returns the logs that hold images, and one sentence for each of the others."""
    return [log for log in logs if log.rows], [
        f"{log.name} holds no image and is left out" for log in logs if not log.rows
    ]


def default_radii(logs: Sequence[Log]) -> tuple[float, ...]:
    """Returns 0, 0.25, ... up to the largest certified radius of a correct image, at least 0.75 and at most 2."""
    largest = max((row.radius for log in logs for row in log.rows if row.correct), default=0.0)
    last = min(max(largest, GRID_LEAST), GRID_MOST)
    return tuple(i * GRID_STEP for i in range(math.floor(last / GRID_STEP) + 1))


def summary(log: Log, radii: Sequence[float] | None = None) -> Summary:
    """Returns the figures of a log, certified accuracy at `radii` (default: `default_radii`).

    Raises `ParameterError` for a log without rows, and for a radius that is negative or not finite.
    """
    from statsmodels.stats.proportion import proportion_confint  # takes a second to import

    if not log.rows:
        raise ParameterError(f"{log.name}: no image to report on")
    radii = default_radii([log]) if radii is None else radii
    if any(not (math.isfinite(r) and r >= 0.0) for r in radii):
        raise ParameterError(f"radii must be finite numbers, 0 or more, not {', '.join(map(str, radii))}")
    images = len(log.rows)
    # -inf is below every radius; 0 is not, and a correct image of radius 0 is certified at 0.
    reached = np.array([row.radius if row.correct else -math.inf for row in log.rows])
    contributions = np.maximum(reached, 0.0)
    seconds = np.array([row.seconds for row in log.rows])
    certified = []
    for radius in radii if log.has_radii else (0.0,):
        count = int((reached >= radius).sum())
        low, high = proportion_confint(count, images, alpha=0.05, method="beta")
        certified.append(CertifiedAccuracy(radius, count, count / images, float(low), float(high)))
    either = np.array(
        [
            r if row.group is None else row.group_radius if row.group_correct else -math.inf
            for r, row in zip(reached.tolist(), log.rows, strict=True)
        ],
        dtype=float,
    )
    coarse_certified = []
    for radius in radii if any(row.group is not None for row in log.rows) else ():
        count = int((either >= radius).sum())
        low, high = proportion_confint(count, images, alpha=0.05, method="beta")
        coarse_certified.append(CertifiedAccuracy(radius, count, count / images, float(low), float(high)))
    several = log.has_radii and images > 1
    return Summary(
        name=log.name,
        image_set=describe_images([row.idx for row in log.rows]),
        images=images,
        acr=math.fsum(contributions) / images if log.has_radii else None,
        acr_error=float(contributions.std(ddof=1)) / math.sqrt(images) if several else None,
        certified=tuple(certified),
        abstained=sum(row.predict == ABSTAINED for row in log.rows) / images,
        seconds_mean=float(seconds.mean()),
        seconds_median=float(np.median(seconds)),
        votes_mean=_mean_votes(log),
        rounded_radii=log.radius_decimals is not None and log.radius_decimals < OUR_RADIUS_DECIMALS,
        settings=dict(log.settings),
        coarse=sum(row.group is not None for row in log.rows) / images,
        coarse_certified=tuple(coarse_certified),
    )


def _mean_votes(log: Log) -> float | None:
    """Returns the mean number of estimation votes per image, or None if the log does not say."""
    votes = [row.n for row in log.rows if row.n is not None]
    return sum(votes) / len(votes) if len(votes) == len(log.rows) else None


def describe_images(indices: Sequence[int]) -> str:
    """Returns the image set in words, whatever its order: `images 0-9999`, `every 20th of 0-9980`, `137 of 0-9980`."""
    ordered = sorted(indices)
    first, last = ordered[0], ordered[-1]
    if len(ordered) == 1:
        return f"image {first}"
    strides = {after - before for before, after in pairwise(ordered)}
    if strides == {1}:
        return f"images {first}-{last}"
    if len(strides) == 1:
        return f"every {_ordinal(strides.pop())} of {first}-{last}"
    return f"{len(ordered)} of {first}-{last}"


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"
