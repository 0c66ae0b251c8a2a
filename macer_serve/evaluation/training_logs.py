"""Reading the logs of training runs: `log.jsonl`, one line per epoch, and `certified.jsonl` beside it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macer_serve.errors import LogError


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """A run's `epochs` in their order, each with its number and metrics, and the epochs at which images were certified.

    Every epoch has `epoch` and `seconds`. Metrics are finite numbers. `recipe` is the text of the recipe file that the
    run keeps, None for a log alone.
    """

    name: str
    epochs: tuple[dict[str, float], ...]
    certified: tuple[dict[str, Any], ...] = ()
    recipe: str | None = None


def is_run(path: Path) -> bool:
    """Returns whether a path names a training run, rather than a certification log."""
    return path.is_dir() or path.suffix == ".jsonl"


def read_training_log(path: str | Path) -> TrainingLog:
    """Returns the log of a run: a `.jsonl` file, the run's folder, or the checkpoint beside the run's folder.

    The epochs of a run of several phases are counted on from phase to phase. Raises `LogError` with the file, and the
    line, of what is missing or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        return TrainingLog(str(path), _epochs(path))
    folder = path if path.suffix == ".run" or (path / "log.jsonl").exists() else path.with_name(path.name + ".run")
    phases = sorted(folder.glob("phase-*.run"), key=lambda phase: int(phase.stem.removeprefix("phase-")))
    if not phases or (folder / "log.jsonl").exists():  # the last phase may not have begun
        phases.append(folder)
    epochs: list[dict[str, float]] = []
    certified: list[dict[str, Any]] = []
    for phase in phases:
        before = len(epochs)
        epochs += [{**epoch, "epoch": before + epoch["epoch"]} for epoch in _epochs(phase / "log.jsonl")]
        curves = phase / "certified.jsonl"
        if curves.exists():
            certified += [{**curve, "epoch": before + curve["epoch"]} for curve in _lines(curves)]
    kept = phases[0] / "recipe.yaml"
    recipe = kept.read_text(encoding="utf-8", errors="replace") if kept.exists() else None
    return TrainingLog(str(path), tuple(epochs), tuple(certified), recipe)


def _epochs(path: Path) -> tuple[dict[str, float], ...]:
    entries = _lines(path)
    if not entries:
        raise LogError(f"{path} holds no epoch")
    for number, entry in enumerate(entries, start=1):
        for name in ("epoch", "seconds"):
            if not isinstance(entry.get(name), int | float):
                raise LogError(f"{path} is not a training log: line {number} has no number named {name!r}")
    return tuple({name: value for name, value in entry.items() if _is_number(value)} for entry in entries)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LogError(f"{path}: {error.strerror or error}; name the training log") from error
    except UnicodeDecodeError as error:
        raise LogError(f"{path} is not a training log: it is not text") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LogError(f"{path} is not a training log: line {number} is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise LogError(f"{path} is not a training log: line {number} is not a JSON object")
        entries.append(entry)
    return entries
