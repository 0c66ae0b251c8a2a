"""A run on many workers, started by Ray Train. Each runs the same loop.

If a worker is lost, training resumes from the last saved state. Every worker reads the data set, and rank 0 writes the
run's folder. Both must be the same place for all of them, on one machine or on a file system that the machines share.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macer_serve.datasets import load_dataset
from macer_serve.errors import InterruptedRunError, MacerError, TrainingError, first_line
from macer_serve.ray_cluster import absolute, ray_cluster, share_of
from macer_serve.training.loop import stop_requests
from macer_serve.training.network import Agreement, Group
from macer_serve.training.options import Callbacks, TrainingOptions
from macer_serve.training.recipe import Recipe
from macer_serve.training.reports import INTERVAL, Receiver, Reporter, start_report_actor
from macer_serve.training.run_state import RunFolder
from macer_serve.training.worker import train_worker

if TYPE_CHECKING:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

log = logging.getLogger(__name__)

# Gives up after this many worker failures without a newly saved state.
MOST_FAILURES = 3
# Most time that workers wait for each other: rank 0 may certify held-out images. Ray itself notices a lost worker.
TIMEOUT = timedelta(days=1)


def train_on_workers(options: TrainingOptions, recipe: Recipe, callbacks: Callbacks) -> None:
    """Trains with `options.workers` workers, until the checkpoint is written.

    If a worker is lost (killed, or its machine is gone), all start again from the last saved state. Raises the
    `MacerError` that a worker raised, `ClusterError` if Ray cannot start, `InterruptedRunError` after SIGTERM or
    SIGINT, or `TrainingError` after `MOST_FAILURES` attempts that saved nothing.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # its notices are not used here
    if options.download:
        for split in ("train", "test") if options.held_out else ("train",):
            load_dataset(options.dataset, options.data_dir, split, download=True)
    with ray_cluster(), stop_requests() as stop_requested:
        _attempts(options, recipe, stop_requested, callbacks)


def _attempts(
    options: TrainingOptions,
    recipe: Recipe,
    stop_requested: Callable[[], bool],
    callbacks: Callbacks,
) -> None:
    """Starts the workers again after each failure, until the run is complete."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    options, scaling = _for_workers(options)
    failures, saved = 0, _saved(options)
    while True:
        failure = _attempt(options, recipe, scaling, stop_requested, callbacks)
        if failure is None:
            return
        if not isinstance(failure, TrainingFailedError | RayError):
            raise failure
        of_workers: dict[int, Exception] = getattr(failure, "worker_failures", {})
        for error in of_workers.values():
            if isinstance(error, MacerError):
                raise error from failure
        if stop_requested():
            raise _interrupted(options) from failure
        log.info("%s", failure)
        failures, saved = (failures + 1, saved) if _saved(options) == saved else (1, _saved(options))
        what = "; ".join(f"worker {rank}: {first_line(error)}" for rank, error in of_workers.items())
        what = what or first_line(getattr(failure, "controller_failure", failure))
        if failures == MOST_FAILURES:
            raise TrainingError(
                f"the workers failed {failures} times without progress ({what}). {_kept(options)} Run the same command "
                "again to continue. macer -v train ... says more of the failures."
            ) from failure
        log.warning("workers failed (%s): all continue from the last saved state", what)


def _for_workers(options: TrainingOptions) -> tuple[TrainingOptions, ScalingConfig]:
    """Returns the options as each worker gets them, and the resources of each worker.

    Raises `ParameterError` if the cluster has fewer GPUs or cores than workers. Ray would wait for them.
    """
    from ray.train import ScalingConfig

    share = share_of(options.workers, device=options.device, cores=options.threads)
    options = replace(
        options,
        device="cuda" if share.gpu else options.device or "cpu",
        threads=options.threads or share.cores,
        data_dir=options.data_dir.absolute(),
        out=options.out.absolute(),
        init=None if options.init is None else absolute(options.init),
        restart=False,
        download=False,
    )
    return options, ScalingConfig(
        num_workers=options.workers, use_gpu=share.gpu, resources_per_worker=share.resources()
    )


def _attempt(
    options: TrainingOptions,
    recipe: Recipe,
    scaling: ScalingConfig,
    stop_requested: Callable[[], bool],
    callbacks: Callbacks,
) -> BaseException | None:
    """Starts all workers once and waits for their end. Returns None, or the error that ended them.

    Raises `InterruptedRunError` if a stop was requested and the workers do not save and end in time.
    """
    actor, failures = start_report_actor(), list[BaseException]()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(options, recipe, scaling, actor, Path(scratch))

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failures.append(error)

        # In the main thread, Ray Train would answer SIGINT by killing the workers.
        fitting = threading.Thread(target=fit, daemon=True)
        fitting.start()
        receiver = Receiver(actor, callbacks)
        while fitting.is_alive():
            fitting.join(INTERVAL)
            receiver.receive(stop_requested())
            if fitting.is_alive() and receiver.timed_out:
                raise _interrupted(options)
    return failures[0] if failures else None


def _trainer(
    options: TrainingOptions, recipe: Recipe, scaling: ScalingConfig, actor: Any, scratch: Path
) -> TorchTrainer:
    """Returns what starts the workers. Ray Train needs a folder, `scratch`, for checkpoints of its own."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _work,
        train_loop_config={"options": options, "recipe": recipe, "actor": actor, "level": log.getEffectiveLevel()},
        torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
        scaling_config=scaling,
        run_config=RunConfig(  # type: ignore[call-arg]  # typed as the version before
            name=options.out.name,
            storage_path=str(scratch),
            failure_config=FailureConfig(controller_failure_limit=0),  # type: ignore[call-arg]
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """Runs in each worker."""
    import ray.train
    import ray.train.torch
    import torch

    logging.getLogger().setLevel(config["level"])
    context = ray.train.get_context()
    options, group = config["options"], Group(context.get_world_rank(), context.get_world_size())
    if options.device == "cuda":
        torch.cuda.set_device(ray.train.torch.get_device())
    reporter, agreement = Reporter(config["actor"], group), Agreement()
    try:
        train_worker(
            options,
            config["recipe"],
            group,
            stop_requested=lambda: agreement(reporter.stop),
            callbacks=reporter.callbacks,
        )
    except InterruptedRunError as error:
        reporter.interrupted(error)
        raise


def _interrupted(options: TrainingOptions) -> InterruptedRunError:
    return InterruptedRunError(f"stopped. {_kept(options)} Run the same command again to continue.")


def _kept(options: TrainingOptions) -> str:
    saved = _saved(options)
    return f"The last saved state is kept: {options.folder / saved[-1]}." if saved else "No state was saved before."


def _saved(options: TrainingOptions) -> list[str]:
    return [path.name for path in RunFolder(options.folder).states()]
