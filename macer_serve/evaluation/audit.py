"""Statements about the data set of a certification log, in sentences, or the reason why the log supports none.

`audit` counts the images that are correct and certified at a radius. `macer_serve.evaluation.statements` bounds what
the count says. A statement needs every image that was to be certified, once each, under one model, plan and alpha. So
logs that lack rows, hold an image twice or mix runs are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from macer_serve.errors import LogError, ParameterError
from macer_serve.evaluation.logs import UNDECODABLE, Log, Row, Settings
from macer_serve.evaluation.statements import good_images, good_in_population, good_share
from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.certificate import confidence_of
from macer_serve.smoothing.noise import caveat_of, kind_of

# Settings that say which rows a log must hold. All others must be the same in all logs of one audit.
_RANGE = ("start", "stop", "every")
_NEEDED = ("checkpoint", "dataset", "alpha", "noise", *_RANGE)


@dataclass(frozen=True, slots=True)
class Audit:
    """What logs prove about a data set. Each of the two statements is false with probability at most `delta`.

    `images` rows were certified at level `alpha` each. `certified` of them are correct with a radius of at least
    `radius`. At least `good` of these images are good: the smoothed classifier gives their label at every point closer
    than `radius`. At least `share` of the population is good, from which the images were drawn independently. If the
    population is finite, `population` is its size, and at least `good_in_population` of its images are good. `seed` is
    what the evaluator chose, `key_id` the issuer's key; one of them is None.
    """

    radius: float
    alpha: float
    delta: float
    images: int
    certified: int
    undecodable: int
    good: int
    share: float | None
    population: int | None
    good_in_population: int | None
    checkpoint: str
    dataset: str
    noise: str
    seed: str | None
    key_id: str | None
    bound: str

    @property
    def sentences(self) -> tuple[str, str]:
        """The statement about these images, and the statement about their population."""
        confidence, what = confidence_of(self.delta), self._what
        first = (
            f"With confidence {confidence}, for at least {self.good:,} of these {self.images:,} images, {what} This "
            "holds however the images were chosen, if they were chosen before the noise was known."
        )
        if self.population is None:
            percent = math.floor(1e4 * float(self.share or 0.0)) / 100
            return first, (
                f"With confidence {confidence}, for at least {percent:.2f}% of the population from which these "
                f"{self.images:,} images were drawn independently, {what}"
            )
        return first, (
            f"With confidence {confidence}, for at least {self.good_in_population:,} of the {self.population:,} images "
            f"from which these {self.images:,} were drawn at random without replacement, {what}"
        )

    @property
    def _what(self) -> str:
        caveat = f", {words}," if (words := caveat_of(self.noise)) else ""
        return (
            f"the {bound_named(self.bound).adjective}smoothed classifier gives the image's label, and no change of L2 "
            f"norm below {self.radius:g} to the model input (pixel values in [0, 1]){caveat} changes the class."
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the sentences rest on, and no file can show."""
        when = "was fixed before the noise was drawn, and so were the labels, the set of images and the radius"
        drawn = (
            f"The {self.population:,} images were fixed, and these were drawn from them at random without replacement."
            if self.population is not None
            else "The images were drawn independently from the population that the second statement is about."
        )
        return (
            f"The model {self.checkpoint} {when}.",
            self._noise,
            f"Second statement only: {drawn[0].lower()}{drawn[1:]}",
            "Each statement holds with its confidence by itself. Both hold together with confidence "
            f"{confidence_of(min(1.0, 2 * self.delta))}.",
        )

    @property
    def _noise(self) -> str:
        if self.key_id is not None:
            return (
                f"The noise follows from the issuer's key {self.key_id}, which was published before the images were "
                "chosen. Whoever holds the private key did not try several models, radii or sets of images."
            )
        known = (
            ' The seed "0" is the default that everybody knows: choose another one for an audit.'
            if self.seed == "0"
            else ""
        )
        return (
            f'The noise follows from the seed "{self.seed}", which the evaluator chose. Nobody who chose the model, '
            f"the images or the radius knew the seed, and no other seeds were tried.{known}"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns figures, sentences and assumptions as JSON values."""
        return {**asdict(self), "statements": list(self.sentences), "assumptions": list(self.assumptions)}

    def to_text(self) -> str:
        """Returns sentences, figures and assumptions as they are printed."""
        undecodable = f", {self.undecodable:,} of them undecodable" if self.undecodable else ""
        figures = (
            f"{self.certified:,} of {self.images:,} images ({100 * self.certified / self.images:.2f}%) are correct and "
            f"certified at radius {self.radius:g}; the others{undecodable} count 0.",
            f"Each certificate is false with probability at most {self.alpha:g}.",
            f"Data set {self.dataset}, noise {self.noise}.",
        )
        parts = (
            ("Of these images", self.sentences[:1]),
            ("Of the population", self.sentences[1:]),
            ("Figures", figures),
            ("Assumed", self.assumptions),
        )
        return "\n\n".join("\n".join([f"{title}:", *(f"  {line}" for line in lines)]) for title, lines in parts)


def delta_of(confidence: str) -> float:
    """Returns 1 - confidence without the rounding of a binary fraction. Raises `ParameterError` outside (0.5, 1)."""
    try:
        delta = 1 - Decimal(confidence)
    except InvalidOperation:
        delta = Decimal("NaN")
    if not delta.is_finite() or not Decimal(0) < delta < Decimal("0.5"):
        raise ParameterError(f"the confidence must lie strictly between 0.5 and 1, such as 0.99, not {confidence}")
    return float(delta)


def audit(logs: Sequence[Log], radius: float, delta: float, *, population: int | None = None) -> Audit:
    """Returns what the logs, the parts of one data set, prove about it at a radius.

    Raises `LogError` for logs that void every statement, and `ParameterError` for a radius that is not above 0, a delta
    outside (0, 0.5), and a population that is smaller than the number of images.
    """
    if not 0.0 < radius < math.inf:
        raise ParameterError(f"the radius of a statement must be a finite number above 0, not {radius:g}")
    settings = _one_run(logs)
    rows = [row for log in logs for row in _complete(log)]
    _require_distinct(rows)
    certified = sum(row.correct and row.radius >= radius for row in rows)
    alpha, images = float(settings["alpha"]), len(rows)
    bound = str(settings.get("bound", "one-sided"))
    key_id, seed = settings.get("key_id"), settings.get("seed")
    if population is not None and population < images:
        raise ParameterError(f"a population of {population:,} cannot hold these {images:,} images")
    return Audit(
        radius=radius,
        alpha=alpha,
        delta=delta,
        images=images,
        certified=certified,
        undecodable=sum(row.input_digest == UNDECODABLE for row in rows),
        good=good_images(certified, images, alpha, delta),
        share=good_share(certified, images, alpha, delta) if population is None else None,
        population=population,
        good_in_population=good_in_population(certified, images, population, alpha, delta) if population else None,
        checkpoint=str(settings["checkpoint"]),
        dataset=str(settings["dataset"]),
        noise=str(settings["noise"]),
        seed=None if key_id is not None else str(seed),
        key_id=None if key_id is None else str(key_id),
        bound=bound,
    )


def _one_run(logs: Sequence[Log]) -> Settings:
    """Returns the settings that all logs share. Raises `LogError` for logs of other origin, and for different runs."""
    for log in logs:
        missing = [name for name in _NEEDED if name not in log.settings]
        if not {"seed", "key_id"} & set(log.settings):
            missing.append("seed")
        if missing or any(row.input_digest is None for row in log.rows):
            why = f"its settings lack {', '.join(missing)}" if missing else "its rows have no input digests"
            raise LogError(
                f"{log.name} supports no statement: {why}. Without digests and settings nobody can see whether images "
                "occur twice, rows are missing or alpha changed. Certify the data set with macer certify"
            )
        if kind_of(str(log.settings["noise"])) is None or not isinstance(log.settings["alpha"], float):
            raise LogError(f"{log.name} supports no statement: its noise or its alpha is unknown")
    first, *others = logs
    for other in others:
        names = sorted({*first.settings, *other.settings} - set(_RANGE))
        for name in names:
            one, another = first.settings.get(name, "absent"), other.settings.get(name, "absent")
            if one != another:
                raise LogError(
                    f"{first.name} and {other.name} are not parts of one run: {name} is {one} in the one and {another} "
                    "in the other. A statement needs one model, one alpha and one source of noise for all images"
                )
    return first.settings


def _complete(log: Log) -> tuple[Row, ...]:
    """Returns the rows of a log. Raises `LogError` unless they are those that its settings promise."""
    start, stop, every = (log.settings[name] for name in _RANGE)
    if not (isinstance(start, int) and isinstance(stop, int) and isinstance(every, int) and every > 0):
        raise LogError(f"{log.name} supports no statement: start, stop and every must be whole numbers")
    expected, found = range(start, stop, every), {row.idx for row in log.rows}
    if missing := [idx for idx in expected if idx not in found]:
        raise LogError(
            f"{log.name} supports no statement: {len(missing):,} of its {len(expected):,} images are missing, the "
            f"first is image {missing[0]}. Every image counts; the same macer certify command continues the log"
        )
    if len(found) > len(expected):
        (more, *_) = sorted(found - set(expected))
        raise LogError(f"{log.name} supports no statement: image {more} is not one of those that its settings name")
    if not found:
        raise LogError(f"{log.name} supports no statement: it holds no image")
    return log.rows


def _require_distinct(rows: Sequence[Row]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        digest = str(row.input_digest)
        if seen.get(digest) == row.idx:
            raise LogError(f"image {row.idx} is in two of the logs: give each part of a data set once")
        if digest != UNDECODABLE and digest in seen:
            raise LogError(
                f"images {seen[digest]} and {row.idx} are the same model input. They share their noise, and so one "
                "false certificate would count twice. Remove one of them from the data set, and certify it again"
            )
        seen[digest] = row.idx
