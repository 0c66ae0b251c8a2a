"""A run on disk: what is needed to continue it bit for bit. Each file is written whole or not at all.

OUT.run/
├── state-00000012-000000.pt    the state after 12 epochs and 0 steps; the latest few are kept
├── recipe.yaml                 the recipe that the run began with
├── log.jsonl                   one line per epoch
├── certified.jsonl             certified curves on held-out images (`held_out.py`)
├── tensorboard/                the same as TensorBoard's curves (`curves.py`)
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from macer_serve.errors import TrainingError, first_line

log = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run. It keeps the latest `keep` states."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.log_path = folder / "log.jsonl"
        self.certified_path = folder / "certified.jsonl"
        self.recipe_path = folder / "recipe.yaml"

    def states(self) -> list[Path]:
        """Returns the saved states, the latest last."""
        return sorted(self.folder.glob("state-*.pt"))

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the latest state, or None if there is none.

        Raises `TrainingError` if the state is damaged, or of a run with another identity.
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
                f"{latest} is damaged ({reason}); {older}discard the run and start anew", settings=("restart",)
            ) from error
        asked = _flat(identity)
        if differing := sorted(k for k in {*saved, *asked} if saved.get(k) != asked.get(k)):
            what = "; ".join(f"{k} was {saved.get(k)!r}, now {asked.get(k)!r}" for k in differing)
            raise TrainingError(
                f"{self.folder} holds a run with other settings: {what}. Use the same settings to continue it, "
                "another output folder to keep it, or discard it and start anew.",
                settings=("out", "restart"),
            )
        return state

    def save(self, state: dict[str, Any], identity: dict[str, Any]) -> None:
        """Writes the state of its `epoch` and `step`, then removes the states that are no longer kept.

        If the disk is full, the oldest states are removed first, except for the latest. Raises `TrainingError` if the
        state cannot be written; the latest state is still there then.
        """
        path = self.folder / f"state-{state['epoch']:08d}-{state['step']:08d}.pt"
        whole = {**state, "identity": json.dumps(identity)}
        while True:
            try:
                _write(path, lambda handle: torch.save(whole, handle))
                break
            except OSError as error:
                older = self.states()[:-1]
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not older:
                    raise self._unwritten(path, error) from error
                log.warning("no space is left on the device of %s: %s is removed", path, older[0].name)
                older[0].unlink()
        for old in self.states()[: -self.keep]:
            old.unlink()

    def log(self, entry: dict[str, Any]) -> None:
        """Adds an epoch to the log, in place of its entries of this epoch and later ones."""
        self._add(self.log_path, entry)

    def log_certified(self, entry: dict[str, Any]) -> None:
        """Adds a certified curve, in place of the curves of this epoch and later ones."""
        self._add(self.certified_path, entry)

    def entries(self) -> list[dict[str, Any]]:
        """Returns the epochs logged so far. Raises `TrainingError` if the log is damaged."""
        return _lines(self.log_path)

    def certified(self) -> list[dict[str, Any]]:
        """Returns the certified curves so far. Raises `TrainingError` if their file is damaged."""
        return _lines(self.certified_path)

    def keep_recipe(self, text: str) -> None:
        """Writes the recipe of a run that begins. A run that continues keeps the one that it began with."""
        if self.states() and self.recipe_path.exists():
            return
        try:
            _write(self.recipe_path, lambda handle: handle.write(text.encode()))
        except OSError as error:
            raise self._unwritten(self.recipe_path, error) from error

    def discard(self) -> None:
        """Removes the states and the logs of the run."""
        for path in (*self.states(), self.log_path, self.certified_path, self.recipe_path):
            path.unlink(missing_ok=True)

    def _add(self, path: Path, entry: dict[str, Any]) -> None:
        kept = [line for line in _lines(path) if line["epoch"] < entry["epoch"]]
        text = "".join(json.dumps(line) + "\n" for line in [*kept, entry])
        try:
            _write(path, lambda handle: handle.write(text.encode()))
        except OSError as error:
            raise self._unwritten(path, error) from error

    def _unwritten(self, path: Path, error: OSError) -> TrainingError:
        states = self.states()
        kept = f"the last saved state is kept: {states[-1]}" if states else "no state was saved before"
        return TrainingError(
            f"{path} could not be written ({error.strerror or error}); {kept}. "
            "Make room and run the same command again."
        )


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file whole or not at all, through `write`. Raises `OSError`."""
    staging = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _Recorded(staging, "w") as handle:
            try:
                write(handle)
            except RuntimeError as error:  # torch.save hides an OSError of the file
                raise handle.error or OSError(first_line(error)) from error
            os.fsync(handle.fileno())
        staging.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
        raise


class _Recorded(FileIO):
    """A file that remembers the error of its last write."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            left = memoryview(data).cast("B")
            total = len(left)
            while left:
                left = left[super().write(left) :]
            return total
        except OSError as error:
            self.error = error
            raise


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise TrainingError(
            f"{path} is damaged ({error}); remove the broken line, or start anew", settings=("restart",)
        ) from error


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings with dotted names, so that a message names the option that differs."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
