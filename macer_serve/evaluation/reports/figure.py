"""Figures of curves for papers: one column wide, legible in grey, and distinct for the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from macer_serve.atomic_writes import atomic_file
from macer_serve.errors import ParameterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SUFFIXES = (".pdf", ".png", ".svg")
WIDTH, HEIGHT = 3.25, 2.3  # inches: a column of a two-column page, and one panel
DPI = 300
MARKERS = 8  # per curve
LEGEND_CHARACTERS = 56  # in a line, with about 8 for a sample of the curve

# Colour, line, marker. The colours are those of Okabe and Ito (2008), which the colour-blind can tell apart. Neighbours
# differ by at least 9 in lightness (L* of CIELAB: 0, 54, 70, 46, 61, 71, 58). No two have the same line or marker.
STYLES: Sequence[tuple[str, Any, str]] = (
    ("#000000", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#56b4e9", "-.", "^"),
    ("#0072b2", ":", "D"),
    ("#cc79a7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#e69f00", (0, (8, 2)), "P"),
    ("#009e73", (0, (2, 1)), "X"),
)
MOST_CURVES = len(STYLES)
_FONTS: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.title_fontsize": 6,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "legend.columnspacing": 1.2,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # TrueType: many publishers refuse fonts of type 3, matplotlib's default
    "svg.hashsalt": "macer",  # the same figure is the same file
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: `y` over `x`, and a band from `low` to `high` if there is one. All have equal lengths."""

    label: str
    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64] | None = None
    high: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """Axes with their curves. `band` says what the bands are. `is_share` makes the vertical axis 0 to 100 %."""

    x_label: str
    y_label: str
    curves: Sequence[Curve]
    band: str = ""
    is_share: bool = False
    logarithmic: bool = False


def save_figure(panels: Sequence[Panel], path: str | Path) -> None:
    """Draws the panels below one another and writes them as a PDF, PNG or SVG file, whole or not at all.

    Raises `ParameterError` for another kind of file, for no panel and for more curves than can be told apart,
    `OutputError` if the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no window system, no state that outlives the call

    path = Path(path)
    check_suffix(path)
    if not panels or any(not panel.curves for panel in panels):
        raise ParameterError("there is nothing to draw")
    names = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    if len(names) > MOST_CURVES:
        raise ParameterError(f"a figure shows at most {MOST_CURVES} curves that can be told apart; name fewer")
    with rc_context(_FONTS):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(panels)), dpi=DPI, layout="constrained")
        axes = figure.subplots(len(panels), squeeze=False)
        lines: dict[str, Line2D] = {}
        for panel, on in zip(panels, axes[:, 0], strict=True):
            lines |= _draw(panel, on, names)
        columns = max(1, min(len(names), LEGEND_CHARACTERS // (max(map(len, names)) + 8)))
        handles = [lines[name] for name in names]
        figure.legend(handles, names, loc="outside upper center", ncols=columns, title=panels[0].band or None)
        undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix.lower())
        with atomic_file(path) as file:
            figure.savefig(file, format=path.suffix.lower()[1:], metadata=undated)


def check_suffix(path: Path) -> None:
    """Raise `ParameterError` unless the path ends as a figure does."""
    if path.suffix.lower() not in SUFFIXES:
        raise ParameterError(f"a figure is a file named *{', *'.join(SUFFIXES)}, not {path.name}", settings=("plot",))


def _draw(panel: Panel, axes: Axes, names: list[str]) -> dict[str, Line2D]:
    """Draws a panel and returns the line of each curve. A name has one style in all panels."""
    lines = {}
    for curve in panel.curves:
        number = names.index(curve.label)
        colour, line, marker = STYLES[number]
        # Markers are shifted from curve to curve, so that none hides another.
        every = max(1, -(-len(curve.x) // MARKERS))
        shifted = ((2 * number + 1) * every // (2 * len(names)), every)
        (lines[curve.label],) = axes.plot(
            curve.x, curve.y, color=colour, ls=line, marker=marker, markevery=shifted, clip_on=False
        )
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, lw=0)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color="0.88", lw=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.logarithmic:
        axes.set_xscale("log")
    left, right = min(float(curve.x[0]) for curve in panel.curves), max(float(curve.x[-1]) for curve in panel.curves)
    if left < right:  # a run of one epoch is one point
        axes.set_xlim(left, right)
    if panel.is_share:
        axes.set_ylim(0, 100)
    return lines
