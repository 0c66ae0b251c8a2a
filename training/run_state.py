"""A run on disk: what is needed to continue it bit for bit, written whole or not at all.

OUT.run/
├── state-00000012-000000.pt    the state after 12 epochs and 0 steps; the latest few are kept
├── log.jsonl                   one line an epoch
└── certified.jsonl             certified curves on held-out images (`training.held_out`)
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from macer_serve.errors import TrainingError, first_line


class RunFolder:
    """The folder of a run, of whose states the latest `keep` are kept."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.log_path = folder / "log.jsonl"
        self.certified_path = folder / "certified.jsonl"

    def states(self) -> list[Path]:
        """The saved states, the latest last."""
        return sorted(self.folder.glob("state-*.pt"))

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The latest state, None where there is none.

        Raises `TrainingError` where it belongs to a run with another identity: continuing it would be
        neither the one run nor the other.
        """
        states = self.states()
        if not states:
            return None
        latest = states[-1]
        try:
            state: dict[str, Any] = torch.load(latest, map_location="cpu", weights_only=True)
            saved = _flat(json.loads(state["identity"]))
        except Exception as error:  # torch.load raises whatever a damaged archive provokes
            reason = first_line(error)
            older = f"remove it to continue from {states[-2].name}, or " if len(states) > 1 else ""
            raise TrainingError(
                f"{latest} is damaged ({reason}); {older}use --restart to discard the run and start anew"
            ) from error
        asked = _flat(identity)
        if differing := sorted(k for k in {*saved, *asked} if saved.get(k) != asked.get(k)):
            what = "; ".join(f"{k} was {saved.get(k)!r}, now {asked.get(k)!r}" for k in differing)
            raise TrainingError(
                f"{self.folder} holds a run with other settings: {what}. Use the same settings to continue it, "
                "another --out to keep it, or --restart to discard it."
            )
        return state

    def save(self, state: dict[str, Any], identity: dict[str, Any]) -> None:
        """Write the state of its `epoch` and `step`, then drop those that are no longer kept.

        Raises `TrainingError` where there is no room or no right to; what was saved before is still there then.
        """
        path = self.folder / f"state-{state['epoch']:08d}-{state['step']:08d}.pt"
        staging = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with staging.open("wb") as handle:
                torch.save({**state, "identity": json.dumps(identity)}, handle)
                handle.flush()
                os.fsync(handle.fileno())
            staging.replace(path)
            for old in self.states()[: -self.keep]:
                old.unlink()
        except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
            raise _unwritten(path, staging, error) from error

    def log(self, entry: dict[str, Any]) -> None:
        """Add an epoch to the log, in place of what it says of that epoch and later ones."""
        self._add(self.log_path, entry)

    def log_certified(self, entry: dict[str, Any]) -> None:
        """Likewise, a certified curve."""
        self._add(self.certified_path, entry)

    def entries(self) -> list[dict[str, Any]]:
        """The epochs logged so far. Raises `TrainingError` where the log is damaged."""
        return _lines(self.log_path)

    def certified(self) -> list[dict[str, Any]]:
        """The certified curves so far; likewise."""
        return _lines(self.certified_path)

    def discard(self) -> None:
        """Forget the run."""
        for path in (*self.states(), self.log_path, self.certified_path):
            path.unlink(missing_ok=True)

    def _add(self, path: Path, entry: dict[str, Any]) -> None:
        kept = [line for line in _lines(path) if line["epoch"] < entry["epoch"]]
        staging = path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with staging.open("w", encoding="utf-8") as handle:
                handle.write("".join(json.dumps(line) + "\n" for line in [*kept, entry]))
                handle.flush()
                os.fsync(handle.fileno())
            staging.replace(path)
        except OSError as error:
            raise _unwritten(path, staging, error) from error


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise TrainingError(
            f"{path} is damaged ({error}); remove the broken line, or use --restart to start anew"
        ) from error


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, so that a difference is named by the option that makes it."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _unwritten(path: Path, staging: Path, error: Exception) -> TrainingError:
    with contextlib.suppress(OSError):
        staging.unlink(missing_ok=True)
    return TrainingError(
        f"{path} could not be written ({first_line(error)}); what was saved before is still there. "
        "Make room and run the same command again."
    )
