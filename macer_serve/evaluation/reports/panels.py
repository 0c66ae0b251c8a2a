"""What plots of certification logs show: shares of the images that reach a radius, a probability, a number of votes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import Log, Row
from macer_serve.evaluation.reports.figure import Curve, Panel

POINTS = 400
BAND = "band: exact 95 % interval (Clopper-Pearson)"

Values = npt.NDArray[np.float64]


def accuracy_panel(logs: Sequence[Log]) -> Panel:
    """Returns certified accuracy against radius, up to the largest certified radius of a correct image."""
    values = [_reached(log, lambda row: row.radius if row.correct else -math.inf) for log in logs if log.has_radii]
    if len(values) < len(logs):
        names = ", ".join(log.name for log in logs if not log.has_radii)
        raise ParameterError(f"{names}: a log of predictions has no radii to plot")
    grid = np.linspace(0.0, max(0.01, *(float(of.max()) for of in values)), POINTS)
    curves = [_curve(log.name, of, grid) for log, of in zip(logs, values, strict=True)]
    return Panel("certified L2 radius (pixel values in [0, 1])", "certified accuracy (%)", curves, BAND, is_share=True)


def probability_panel(logs: Sequence[Log]) -> Panel:
    """Returns the share of images whose own class got at least a share p of the votes.

    ACR hides this distribution: a few images with p near 1 outweigh many near 1/2. An image for which another class was
    selected counts as p = 0. Raises `ParameterError` for a log that does not hold the votes.
    """

    def share(row: Row) -> float:
        return (row.count_a or 0) / row.n if row.top == row.label and row.n else 0.0

    _require_votes(logs)
    grid = np.linspace(0.0, 1.0, POINTS + 1)[1:]
    curves = [_curve(log.name, _reached(log, share), grid) for log in logs]
    return Panel("share p of the votes", "images whose class got $\\geq p$ (%)", curves, BAND, is_share=True)


def votes_panel(logs: Sequence[Log]) -> Panel:
    """Returns the share of images that took at least so many estimation votes.

    Raises `ParameterError` for a log that does not hold their numbers.
    """
    _require_votes(logs)
    values = [_reached(log, lambda row: float(row.n or 0)) for log in logs]
    least, most = (float(pick(of.min() if pick is min else of.max() for of in values)) for pick in (min, max))
    grid = np.geomspace(max(1.0, least / 2), max(2.0, 1.1 * most), POINTS)
    curves = [_curve(log.name, of, grid) for log, of in zip(logs, values, strict=True)]
    return Panel("estimation votes v", "images that took $\\geq v$ (%)", curves, BAND, is_share=True, logarithmic=True)


PANELS: dict[str, Callable[[Sequence[Log]], Panel]] = {
    "accuracy": accuracy_panel,
    "probability": probability_panel,
    "votes": votes_panel,
}


def _reached(log: Log, value: Callable[[Row], float]) -> Values:
    return np.array([value(row) for row in log.rows])


def _require_votes(logs: Sequence[Log]) -> None:
    for log in logs:
        if any(None in (row.n, row.count_a, row.top) for row in log.rows):
            raise ParameterError(f"{log.name} does not say how the votes fell: its columns lack n, count_a and top")


def _curve(label: str, values: Values, grid: Values) -> Curve:
    """Returns the percentage of the values that are at least each point of the grid, with its interval, down to 0."""
    from statsmodels.stats.proportion import proportion_confint  # takes a second to import

    counts = len(values) - np.searchsorted(np.sort(values), grid, side="left")
    end = int(np.count_nonzero(counts)) + 1  # counts fall; the curve ends where it meets the axis
    low, high = proportion_confint(counts[:end], len(values), alpha=0.05, method="beta")
    return Curve(label, grid[:end], 100 * counts[:end] / len(values), 100 * np.asarray(low), 100 * np.asarray(high))
