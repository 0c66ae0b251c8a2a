"""Sweeps: one recipe run with several seeds. One row per recipe, each figure with its error between seeds.

The error of a mean is its standard error over the seeds: the deviation of the seeds' figures, over the root of their
number. It says how far another few seeds might lie. The error of an ACR in the table of single logs is another one, of
the choice of images, which all seeds share.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import Log
from macer_serve.evaluation.reports.table import NOT_KNOWN, PLUS_MINUS, Table
from macer_serve.evaluation.reports.training_runs import METRICS, last_value
from macer_serve.evaluation.summaries import Summary, summary
from macer_serve.evaluation.training_logs import TrainingLog

_SEED = re.compile(r"[/_-]?seed[_-]?[0-9]+")
_NOTE = f"{PLUS_MINUS}: standard error between seeds."


def with_seeds(paths: Sequence[Path]) -> list[Path]:
    """Returns the paths, with the folder of a sweep of training runs replaced by its runs."""
    return [one for path in paths for one in (sorted(path.glob("seed-*.run")) if path.is_dir() else []) or [path]]


def sweep_of(name: str) -> str:
    """Returns the name of a log or a run without its seed. Raises `ParameterError` for a name without one."""
    stem = name.removesuffix("/log.jsonl").removesuffix(".run").removesuffix(".gz")
    without, seeds = _SEED.subn("", stem)
    if not seeds:
        raise ParameterError(
            f"{name} does not say its seed, as in recipe/seed-0.tsv; give logs of one recipe one label",
            settings=("label",),
        )
    return Path(without.removesuffix(".tsv").removesuffix(".jsonl")).name


def log_sweeps(logs: Sequence[Log], names: Sequence[str], radii: Sequence[float]) -> Table:
    """Returns one row per recipe, from certification logs of its seeds. `names` are the recipes of the logs.

    Raises `ParameterError` if logs of one recipe are of different images, or have no radii.
    """
    found: dict[str, list[Summary]] = {}
    for name, log in zip(names, logs, strict=True):
        if not log.has_radii:
            raise ParameterError(f"{log.name} has no radii to average")
        found.setdefault(name, []).append(summary(log, radii))
    figures: dict[str, Callable[[Summary], float]] = {"ACR": lambda one: one.acr or 0.0}
    figures |= {f"r={radius:g}": _accuracy_at(radius) for radius in radii}
    figures["abstained"] = lambda one: 100 * one.abstained
    rows, records = [], []
    for name, group in found.items():
        if len(sets := sorted({one.image_set for one in group})) > 1:
            raise ParameterError(f"logs of {name} are of different images: {'; '.join(sets)}")
        averaged = {title: mean_and_error([figure(one) for one in group]) for title, figure in figures.items()}
        cells = [_cell(averaged[title], 4 if title == "ACR" else 1) for title in figures]
        rows.append([name, sets[0], str(group[0].images), str(len(group)), *cells])
        records.append({"recipe": name, "image_set": sets[0], "images": group[0].images, **_record(group, averaged)})
    return Table(
        titles=["recipe", "image set", "images", "seeds", *figures],
        rows=rows,
        records=records,
        left=frozenset((0, 1)),
        notes=[_NOTE, "ACR: average certified radius. r=R: certified accuracy in %. abstained: in %."],
    )


def run_sweeps(runs: Sequence[TrainingLog], names: Sequence[str]) -> Table:
    """Returns one row per recipe, from training runs of its seeds, with the metrics of their last epochs.

    Raises `ParameterError` if runs of one name keep different recipes.
    """
    found: dict[str, list[TrainingLog]] = {}
    for name, run in zip(names, runs, strict=True):
        found.setdefault(name, []).append(run)
    present = [name for name in METRICS if all(last_value(run, name) is not None for run in runs)]
    rows, records = [], []
    for name, group in found.items():
        if len({run.recipe for run in group if run.recipe is not None}) > 1:
            raise ParameterError(f"the runs of {name} are of different recipes: see recipe.yaml in their folders")
        averaged = {metric: mean_and_error([last_value(run, metric) or 0.0 for run in group]) for metric in present}
        hours = [math.fsum(epoch["seconds"] for epoch in run.epochs) / 3600 for run in group]
        epochs = sorted({len(run.epochs) for run in group})
        cells = [_cell(averaged[metric], 4) for metric in present]
        rows.append([name, str(len(group)), "-".join(map(str, epochs)), f"{math.fsum(hours):.2f}", *cells])
        records.append({"recipe": name, "epochs": epochs[-1], "hours": math.fsum(hours), **_record(group, averaged)})
    return Table(
        titles=["recipe", "seeds", "epochs", "hours", *present],
        rows=rows,
        records=records,
        left=frozenset((0,)),
        notes=[_NOTE, "hours: of all seeds.", *(f"{name}: {METRICS[name]}, last epoch." for name in present)],
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error, None for a single value."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _accuracy_at(radius: float) -> Callable[[Summary], float]:
    return lambda one: 100 * next(at.accuracy for at in one.certified if at.radius == radius)


def _cell(figure: tuple[float, float | None], decimals: int) -> str:
    mean, error = figure
    return f"{mean:.{decimals}f} {PLUS_MINUS} " + (NOT_KNOWN if error is None else f"{error:.{decimals}f}")


def _record(group: Sequence[object], averaged: Mapping[str, tuple[float, float | None]]) -> dict[str, Any]:
    figures = {name: mean for name, (mean, _) in averaged.items()}
    return {"seeds": len(group), **figures, **{f"{name} error": error for name, (_, error) in averaged.items()}}
