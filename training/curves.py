"""TensorBoard's view of the logs of a run, written anew when the run starts or continues."""

from __future__ import annotations

import shutil
from typing import Any

from macer_serve.errors import TrainingError
from macer_serve.training.run_state import RunFolder


class Curves:
    """Event files in `OUT.run/tensorboard`, shown by `tensorboard --logdir OUT.run`.

    Raises `TrainingError` if tensorboardX is not installed.
    """

    def __init__(self, folder: RunFolder) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise TrainingError(
                "tensorboardX is not installed; install it, or train without event files", settings=("no_tensorboard",)
            ) from error
        self.folder = folder
        self._open: Any = tensorboardX.SummaryWriter
        self._writer: Any = None
        self._written: set[tuple[str, int]] = set()

    def update(self) -> None:
        """Writes the entries of the logs that are not written yet."""
        if self._writer is None:  # a command that was refused must leave the files as they are
            where = self.folder.folder / "tensorboard"
            shutil.rmtree(where, ignore_errors=True)
            self._writer = self._open(str(where), flush_secs=1)
        for kind, entries in (("train", self.folder.entries()), ("certified", self.folder.certified())):
            for entry in entries:
                if (kind, entry["epoch"]) in self._written:
                    continue
                self._written.add((kind, entry["epoch"]))
                for name, value in _scalars(entry):
                    self._writer.add_scalar(f"{kind}/{name}", value, entry["epoch"])

    def close(self) -> None:
        """Writes what is buffered."""
        if self._writer is not None:
            self._writer.close()


def _scalars(entry: dict[str, Any]) -> list[tuple[str, float]]:
    flat = [(name, value) for name, value in entry.items() if name != "certified"]
    flat += [(f"accuracy at radius {radius}", value) for radius, value in entry.get("certified", {}).items()]
    return [(name, float(value)) for name, value in flat if isinstance(value, int | float) and name != "epoch"]
