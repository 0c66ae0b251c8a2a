"""One training run from options to checkpoint, in this process or on the workers of Ray Train."""

from __future__ import annotations

import os
from pathlib import Path

from macer_serve.checkpoint import FILES, CheckpointConfig, load_config
from macer_serve.errors import CheckpointError
from macer_serve.locks import locked
from macer_serve.training.images import check_images
from macer_serve.training.network import Group
from macer_serve.training.options import Callbacks, TrainingOptions
from macer_serve.training.recipe import Recipe
from macer_serve.training.run_state import RunFolder
from macer_serve.training.worker import train_worker


def run_training(options: TrainingOptions, recipe: Recipe, callbacks: Callbacks | None = None) -> CheckpointConfig:
    """Trains, writes `options.out` and returns its configuration.

    Raises `DataError`, `ParameterError`, `TrainingError`, `OutputError` if another process writes `out`, or
    `CheckpointError` if `out` is not free.
    """
    callbacks = callbacks or Callbacks()
    require_free(options.out)
    with locked(options.out):  # two runs in one folder would mix their states and lose a checkpoint
        check_images(options, callbacks)
        if options.restart:
            RunFolder(options.folder).discard()
        if options.workers > 1:
            from macer_serve.training.ray_workers import train_on_workers

            train_on_workers(options, recipe, callbacks)
        else:
            train_worker(options, recipe, Group(), callbacks=callbacks)
    return load_config(options.out)


def require_free(out: Path) -> None:
    """Raises what `save_checkpoint` would raise after the hours of training."""
    if out.exists() and not (out.is_dir() and all(p.name in FILES for p in out.iterdir())):
        raise CheckpointError(f"{out} holds other files than a checkpoint's; choose another folder", settings=("out",))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    if not os.access(out.parent, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: {out.parent} is not writable")
