"""Tables of certification logs: ACR, certified accuracy, abstentions, time.

A wrong or abstained image counts radius 0 in the ACR and is not certified at any radius. Certified accuracy at
r is the share of images that are correct with radius >= r, at r = 0 of those correct and not abstained (the
published convention). Published logs print radii with three significant digits, rounded to nearest: what is
computed from them can exceed what was certified, and the table says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import ABSTAINED, Log

GRID_STEP = 0.25
GRID_LEAST, GRID_MOST = 0.75, 2.0
OUR_RADIUS_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class CertifiedAccuracy:
    """The share of images certified at `radius`, with its exact (Clopper-Pearson) 95 % interval."""

    radius: float
    certified: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a log says about a smoothed classifier. Shares lie in [0, 1], radii are L2 of pixel values in [0, 1].

    `acr_error` is the standard error of the ACR, None for a single image; `votes_mean` the estimation votes an image,
    None for logs that do not say; `rounded_radii` tells that radii
    were printed with fewer than 6 decimals.
    """

    name: str
    image_set: str
    images: int
    acr: float
    acr_error: float | None
    certified: tuple[CertifiedAccuracy, ...]
    abstained: float
    seconds_mean: float
    seconds_median: float
    votes_mean: float | None
    rounded_radii: bool
    settings: dict[str, str]


def restrict(log: Log, start: int | None, stop: int | None) -> Log:
    """The rows of the log with start <= idx < stop; None is no limit."""
    first, end = start or 0, math.inf if stop is None else stop
    return replace(log, rows=tuple(row for row in log.rows if first <= row.idx < end))


def default_radii(logs: Sequence[Log]) -> tuple[float, ...]:
    """0, 0.25, 0.5, 0.75 and on in steps of 0.25 to the largest certified radius of a correct image, at most 2."""
    largest = max((row.radius for log in logs for row in log.rows if row.correct), default=0.0)
    last = min(max(largest, GRID_LEAST), GRID_MOST)
    return tuple(i * GRID_STEP for i in range(math.floor(last / GRID_STEP) + 1))


def summary(log: Log, radii: Sequence[float] | None = None) -> Summary:
    """The figures of the log, certified accuracy at `radii` (default: `default_radii`).

    Raises `ParameterError` for a log without rows or a radius that is negative or not finite.
    """
    from statsmodels.stats.proportion import proportion_confint  # a second to import

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
    for radius in radii:
        count = int((reached >= radius).sum())
        low, high = proportion_confint(count, images, alpha=0.05, method="beta")
        certified.append(CertifiedAccuracy(radius, count, count / images, float(low), float(high)))
    return Summary(
        name=log.name,
        image_set=describe_images([row.idx for row in log.rows]),
        images=images,
        acr=math.fsum(contributions) / images,
        acr_error=float(contributions.std(ddof=1)) / math.sqrt(images) if images > 1 else None,
        certified=tuple(certified),
        abstained=sum(row.predict == ABSTAINED for row in log.rows) / images,
        seconds_mean=float(seconds.mean()),
        seconds_median=float(np.median(seconds)),
        votes_mean=_mean_votes(log),
        rounded_radii=log.radius_decimals is not None and log.radius_decimals < OUR_RADIUS_DECIMALS,
        settings=dict(log.settings),
    )


def _mean_votes(log: Log) -> float | None:
    """Estimation votes an image; None for logs that do not say."""
    votes = [row.n for row in log.rows if row.n is not None]
    return sum(votes) / len(votes) if len(votes) == len(log.rows) else None


def describe_images(indices: Sequence[int]) -> str:
    """The image set in words: `images 0-9999`, `every 20th of 0-9980`, `137 of 0-9980`. Order does not matter."""
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


def as_json(summaries: Sequence[Summary]) -> str:
    """A JSON array with one object a summary, its fields named as in `Summary`."""
    return json.dumps([asdict(one) for one in summaries], indent=2, allow_nan=False)


def as_table(summaries: Sequence[Summary]) -> str:
    """A text table, one row a summary, with notes below. All summaries must be at the same radii."""
    if not summaries:
        return ""
    radii = [at.radius for at in summaries[0].certified]
    if any([at.radius for at in one.certified] != radii for one in summaries):
        raise ParameterError("one table needs summaries at the same radii")
    titles = [
        "log",
        "image set",
        "images",
        "ACR",
        *(f"r={r:g}" for r in radii),
        "+/-",
        "abstained",
        "votes",
        "s/image",
        "median",
    ]
    rows = [titles]
    for name, one in zip(_short_names(summaries), summaries, strict=True):
        widest = max((max(at.accuracy - at.low, at.high - at.accuracy) for at in one.certified), default=0.0)
        rows.append(
            [
                name + " *" * one.rounded_radii,
                one.image_set,
                str(one.images),
                f"{one.acr:.4f}" + ("" if one.acr_error is None else f" +/- {one.acr_error:.4f}"),
                *(f"{100 * at.accuracy:.1f}" for at in one.certified),
                f"{100 * widest:.1f}",
                f"{100 * one.abstained:.1f}",
                "-" if one.votes_mean is None else f"{one.votes_mean:.0f}",
                _seconds(one.seconds_mean),
                _seconds(one.seconds_median),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(row)]
        for row in (zip(row, widths, strict=True) for row in rows)
    ]
    notes = [
        "",
        "ACR: average certified radius +/- its standard error; a wrong or abstained image counts radius 0.",
        "r=...: certified accuracy, % of images correct with radius >= r (r=0: correct and not abstained);",
        "+/-: the farthest that an exact 95 % interval of these reaches from its figure, in points.",
        "votes: estimation votes an image, the mean; s/image: seconds, their mean and median.",
    ]
    if any(one.rounded_radii for one in summaries):
        notes.append(
            "* radii printed with fewer than 6 decimals, as a rule rounded to nearest: some exceed what was certified."
        )
    return "\n".join([*("  ".join(cells) for cells in aligned), *notes])


def _short_names(summaries: Sequence[Summary]) -> list[str]:
    """File names without their folders, where that tells the logs apart."""
    names = [one.name for one in summaries]
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(set(names)) else names


def _seconds(seconds: float) -> str:
    return f"{seconds:#.3g}".rstrip(".") if seconds < 999.5 else f"{seconds:.0f}"
