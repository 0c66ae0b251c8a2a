"""A run on many workers: Ray Train starts them, the same loop runs in each, and a lost one costs what was not saved.

Every worker reads the data set, and the first writes the run's folder: both must be the same place for all of them,
on one machine or on a file system that the machines of a cluster share.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from macer_serve.errors import MacerError, ParameterError, TrainingError
from training.network import Group
from training.recipes import Recipe
from training.session import TrainingOptions, train_here

log = logging.getLogger(__name__)

# Losses in a row without an epoch or a save between them: then it is not chance, and goes on no longer.
MOST_LOSSES = 3


def train_on_workers(options: TrainingOptions, recipe: Recipe) -> None:
    """Train with `options.workers` workers, until the checkpoint is written.

    A worker that is lost (killed, its machine gone) ends the attempt; all start again from the last saved state.
    Raises what a worker raised for the user's sake, or `TrainingError` after `MOST_LOSSES` attempts that saved nothing.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    try:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        use_gpu = options.device == "cuda" or (options.device is None and gpus > 0)
        if options.workers > (gpus if use_gpu else cores):
            there = f"{gpus} GPUs" if use_gpu else f"{cores} CPU cores"
            raise ParameterError(f"--workers {options.workers} needs one each, and the cluster has {there}")
        threads = options.threads or max(1, cores // options.workers)
        options = replace(
            options,
            device="cuda" if use_gpu else "cpu",
            threads=threads,
            data_dir=options.data_dir.absolute(),
            out=options.out.absolute(),
            init=_absolute(options.init),
            restart=False,
            download=False,
        )
        losses, saved = 0, _saved(options)
        while True:
            trainer = TorchTrainer(
                _work,
                train_loop_config={"options": options, "recipe": recipe},
                scaling_config=ScalingConfig(
                    num_workers=options.workers,
                    use_gpu=use_gpu,
                    resources_per_worker={"GPU": 1} if use_gpu else {"CPU": min(threads, cores // options.workers)},
                ),
                run_config=RunConfig(
                    name=options.out.name, storage_path=str(options.run_folder.folder.absolute() / "ray")
                ),
            )
            try:
                trainer.fit()
                return
            except TrainingFailedError as error:
                failures = getattr(error, "worker_failures", {})
                for failure in failures.values():
                    if isinstance(failure, MacerError):
                        raise failure from error
                losses, saved = (losses + 1, saved) if _saved(options) == saved else (1, _saved(options))
                what = "; ".join(f"worker {rank}: {_first_line(failure)}" for rank, failure in failures.items())
                what = what or _first_line(error)
                if losses == MOST_LOSSES:
                    raise TrainingError(
                        f"workers were lost {losses} times without progress ({what}); what was saved is kept in "
                        f"{options.run_folder.folder}. Run the same command again to continue."
                    ) from error
                log.warning("a worker was lost (%s): all continue from the last saved state", what)
    finally:
        if started:
            ray.shutdown()


def _work(config: dict[str, Any]) -> None:
    """What each worker does."""
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    options, recipe = config["options"], config["recipe"]
    if options.device == "cuda":
        torch.cuda.set_device(ray.train.torch.get_device())
    shown = time.monotonic()

    def progress(epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        nonlocal shown
        if context.get_world_rank() == 0 and (time.monotonic() - shown > 10 or step == steps):
            shown = time.monotonic()
            loss = f", loss {metrics['loss']:.3f} in the epoch before" if "loss" in metrics else ""
            print(f"epoch {epoch + 1}/{recipe.epochs}, step {step}/{steps}{loss}", file=sys.stderr, flush=True)

    group = Group(context.get_world_rank(), context.get_world_size())
    train_here(options, recipe, group, progress=progress)


def _saved(options: TrainingOptions) -> list[str]:
    return [path.name for path in options.run_folder.states()]


def _absolute(checkpoint: str | None) -> str | None:
    if checkpoint is None or checkpoint.startswith("bundled:"):
        return checkpoint
    return str(Path(checkpoint).expanduser().absolute())


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
