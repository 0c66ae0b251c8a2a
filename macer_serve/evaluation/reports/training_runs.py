"""Training runs: a table of where they stand, and the curves of their metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from macer_serve.errors import ParameterError
from macer_serve.evaluation.reports.figure import Curve, Panel
from macer_serve.evaluation.reports.table import NOT_KNOWN, Table
from macer_serve.evaluation.training_logs import TrainingLog

ACR = "acr"  # of the held-out images, in the file beside the log
# Metrics in the order of the table and of the plot, and what they are. Logs may hold more of them.
METRICS = {
    "loss": "training loss",
    "noisy_correct": "noisy copies right (share)",
    "correct": "images right (share)",
    "soft_radius": "mean soft radius",
    ACR: "ACR of held-out images",
    "lr": "learning rate",
}
_PLOTTED = ("loss", "noisy_correct", ACR)


def training_table(runs: Sequence[TrainingLog]) -> Table:
    """Returns one row per run, with the metrics of its last epoch. The records are the epochs of all runs."""
    present = [name for name in METRICS if any(_points(run, name)[0] for run in runs)]
    rows = []
    for run in runs:
        seconds = [epoch["seconds"] for epoch in run.epochs]
        last = [last_value(run, name) for name in present]
        figures = [NOT_KNOWN if value is None else f"{value:.4g}" for value in last]
        rows.append([_name(run), str(len(seconds)), f"{math.fsum(seconds) / 3600:.2f}", *figures])
    return Table(
        titles=["run", "epochs", "hours", *present],
        rows=rows,
        records=[{"run": run.name, **epoch} for run in runs for epoch in run.epochs],
        left=frozenset((0,)),
        notes=[f"{name}: {METRICS[name]}, last epoch." for name in present],
    )


def training_panels(runs: Sequence[TrainingLog], metrics: Sequence[str] = ()) -> list[Panel]:
    """Returns one panel per metric, a curve per run that has it; by default those of `_PLOTTED` that some run has.

    Raises `ParameterError` for a metric that no run has.
    """
    known = list(dict.fromkeys([name for run in runs for epoch in run.epochs for name in epoch] + [ACR]))
    panels = []
    for name in metrics or _PLOTTED:
        curves = [
            Curve(_name(run), np.array(epochs), np.array(values))
            for run in runs
            for epochs, values in [_points(run, name)]
            if epochs
        ]
        if curves:
            panels.append(Panel("epoch", METRICS.get(name, name), curves))
        elif metrics:
            raise ParameterError(f"no run has a metric {name!r}; there are {', '.join(known)}", settings=("panels",))
    return panels


def last_value(run: TrainingLog, name: str) -> float | None:
    """Returns a metric at the last epoch at which it is known, or None if it never is."""
    values = _points(run, name)[1]
    return values[-1] if values else None


def _points(run: TrainingLog, name: str) -> tuple[list[float], list[float]]:
    """Returns the epochs, counted from 1, at which a metric is known, and its values there."""
    entries = run.certified if name == ACR else run.epochs
    known = [(entry["epoch"] + 1, entry[name]) for entry in entries if entry.get(name) is not None]
    return [float(epoch) for epoch, _ in known], [float(value) for _, value in known]


def _name(run: TrainingLog) -> str:
    """Returns what the run is called: its folder without `.run`, or its file without `.jsonl`."""
    path = Path(run.name)
    return (path.parent if path.name == "log.jsonl" else path).name.removesuffix(".run").removesuffix(".jsonl")
