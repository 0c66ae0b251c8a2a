"""The table of certification logs. `COLUMNS` and `NOTES` are its one home: every format shows the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from macer_serve.errors import ParameterError
from macer_serve.evaluation.reports.table import NOT_KNOWN, PLUS_MINUS, Table
from macer_serve.evaluation.summaries import CertifiedAccuracy, Summary


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, and the cell of a log. `is_words` aligns to the left; in `contest` the largest wins."""

    title: str
    cell: Callable[[Summary], str]
    is_words: bool = False
    contest: bool = False


def _columns(radii: Sequence[float]) -> tuple[Column, ...]:
    return (
        Column("log", lambda one: one.name + " *" * one.rounded_radii, is_words=True),
        Column("image set", lambda one: one.image_set, is_words=True),
        Column("images", lambda one: str(one.images)),
        Column("ACR", _acr, contest=True),
        *(Column(f"r={radius:g}", _accuracy_at(radius), contest=True) for radius in radii),
        Column(PLUS_MINUS, lambda one: _percent(_widest([one.at(radius) for radius in radii]))),
        Column("abstained", lambda one: _percent(one.abstained)),
        Column("votes", lambda one: NOT_KNOWN if one.votes_mean is None else f"{one.votes_mean:.0f}"),
        Column("s/image", lambda one: _seconds(one.seconds_mean)),
        Column("median", lambda one: _seconds(one.seconds_median)),
    )


NOTES = (
    f"ACR: average certified radius {PLUS_MINUS} its standard error. A wrong or abstained image counts as radius 0.",
    "r=R: certified accuracy, % of the images that are correct with a radius of at least R (r=0: and not abstained).",
    f"{PLUS_MINUS}: percentage points, the farthest that an exact 95 % interval of a figure reaches from the figure.",
    "votes: mean number of estimation votes per image. s/image, median: mean and median of the seconds per image.",
)
_NOT_KNOWN_NOTE = f"{NOT_KNOWN}: the log does not say. A log of predictions (PREDICT) has no radii."
_ROUNDED_NOTE = "* Radii with fewer than 6 decimals, most likely rounded to nearest: some exceed what was certified."


def summary_table(summaries: Sequence[Summary]) -> Table:
    """Returns the table of the logs, one row each. The records are the summaries, field by field.

    The best of a column is the best among logs of one image set, if there are several; figures that print alike are
    equal. Raises `ParameterError` unless all summaries with radii are at the same radii, and for no summary.
    """
    if not summaries:
        raise ParameterError("no log to tabulate")
    grids = {tuple(at.radius for at in one.certified) for one in summaries if one.acr is not None}
    if len(grids) > 1:
        raise ParameterError("one table needs summaries at the same radii")
    columns = _columns(grids.pop() if grids else (0.0,))
    named = [replace(one, name=name) for name, one in zip(short_names(summaries), summaries, strict=True)]
    rows = [[column.cell(one) for column in columns] for one in named]
    notes = list(NOTES)
    if any(one.acr is None for one in summaries):
        notes.append(_NOT_KNOWN_NOTE)
    if any(one.rounded_radii for one in summaries):
        notes.append(_ROUNDED_NOTE)
    for one in named:
        if one.coarse_certified:
            figures = ", ".join(f"r={at.radius:g}: {_percent(at.accuracy)}" for at in one.coarse_certified)
            notes.append(
                f"{one.name}: {_percent(one.coarse)} % of the images are abstentions that certify a group of classes. "
                f"Class or group right, %: {figures}."
            )
    return Table(
        titles=[column.title for column in columns],
        rows=rows,
        records=[asdict(one) for one in summaries],
        left=frozenset(at for at, column in enumerate(columns) if column.is_words),
        best=frozenset(
            (row, at) for at, column in enumerate(columns) if column.contest for row in _best(summaries, rows, at)
        ),
        notes=notes,
    )


class Named(Protocol):
    """A log, or its summary."""

    @property
    def name(self) -> str: ...


def short_names(logs: Sequence[Named]) -> list[str]:
    """Returns the names of the files without their folders, if these names are different."""
    names = [one.name for one in logs]
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(set(names)) else names


def _best(summaries: Sequence[Summary], rows: Sequence[Sequence[str]], column: int) -> Iterator[int]:
    """Yields the rows with the largest printed figure of each image set that several logs share."""
    by_set: dict[str, dict[int, float]] = {}
    for row, (one, cells) in enumerate(zip(summaries, rows, strict=True)):
        if cells[column] != NOT_KNOWN:
            figure = float(cells[column].partition(" ")[0])
            by_set.setdefault(one.image_set, {})[row] = figure
    for figures in by_set.values():
        if len(figures) > 1:
            yield from (row for row, figure in figures.items() if figure == max(figures.values()))


def _acr(one: Summary) -> str:
    if one.acr is None:
        return NOT_KNOWN
    return f"{one.acr:.4f}" + ("" if one.acr_error is None else f" {PLUS_MINUS} {one.acr_error:.4f}")


def _accuracy_at(radius: float) -> Callable[[Summary], str]:
    def cell(one: Summary) -> str:
        at = one.at(radius)
        return _percent(None if at is None else at.accuracy)

    return cell


def _widest(certified: Sequence[CertifiedAccuracy | None]) -> float | None:
    """Returns the widest distance to an end of the intervals."""
    return max((max(at.accuracy - at.low, at.high - at.accuracy) for at in certified if at), default=None)


def _percent(share: float | None) -> str:
    return NOT_KNOWN if share is None else f"{100 * share:.1f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:#.3g}".rstrip(".") if seconds < 999.5 else f"{seconds:.0f}"
