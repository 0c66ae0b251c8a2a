"""A run on disk: what is needed to continue it bit for bit, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from macer_serve.errors import TrainingError


class RunFolder:
    """`OUT.run/`: `state.pt` (latest state), `log.jsonl` (one line an epoch)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_path = folder / "state.pt"
        self.log_path = folder / "log.jsonl"

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The saved state, None where there is none.

        Raises `TrainingError` where it belongs to a run with another identity: continuing it would be
        neither the one run nor the other.
        """
        if not self.state_path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.state_path, map_location="cpu", weights_only=True)
            saved = _flat(json.loads(state["identity"]))
        except Exception as error:  # torch.load raises whatever a damaged archive provokes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingError(
                f"{self.state_path} is damaged ({reason}); use --restart to discard it and start anew"
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
        """Replace the saved state atomically; raises `TrainingError` where there is no room or no right to."""
        staging = self.state_path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with staging.open("wb") as handle:
                torch.save({**state, "identity": json.dumps(identity)}, handle)
                handle.flush()
                os.fsync(handle.fileno())
            staging.replace(self.state_path)
        except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
            raise _unwritten(self.state_path, staging, error) from error

    def log(self, entry: dict[str, Any]) -> None:
        """Append one epoch to the log, dropping lines of epochs that are being done again."""
        kept = [line for line in self.entries() if line["epoch"] < entry["epoch"]]
        staging = self.log_path.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with staging.open("w", encoding="utf-8") as handle:
                handle.write("".join(json.dumps(line) + "\n" for line in [*kept, entry]))
                handle.flush()
                os.fsync(handle.fileno())
            staging.replace(self.log_path)
        except OSError as error:
            raise _unwritten(self.log_path, staging, error) from error

    def entries(self) -> list[dict[str, Any]]:
        """The epochs logged so far. Raises `TrainingError` where the log is damaged."""
        if not self.log_path.is_file():
            return []
        try:
            return [json.loads(line) for line in self.log_path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise TrainingError(
                f"{self.log_path} is damaged ({error}); remove the broken line, or use --restart to start anew"
            ) from error

    def discard(self) -> None:
        """Forget the run."""
        for path in (self.state_path, self.log_path):
            path.unlink(missing_ok=True)


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
        f"{path} could not be written ({str(error).splitlines()[0]}); what was saved before is still there. "
        "Make room and run the same command again."
    )
