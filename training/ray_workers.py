"""A run on many workers: Ray Train starts them, the same loop runs in each, and a lost one costs what was not saved.

Every worker reads the data set, and the first writes the run's folder: both must be the same place for all of them,
on one machine or on a file system that the machines of a cluster share.
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
from macer_serve.errors import MacerError, ParameterError, TrainingError, first_line
from macer_serve.evaluation.logs import Row
from macer_serve.training.desk import REPORTS, Hear, Listening, Reports, new_desk
from macer_serve.training.loop import InterruptedRunError, Progress, stop_requests
from macer_serve.training.network import Agreement, Group
from macer_serve.training.recipes import Recipe
from macer_serve.training.session import TrainingOptions, train_here

if TYPE_CHECKING:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

log = logging.getLogger(__name__)

# Losses in a row without an epoch or a save between them: then it is not chance, and goes on no longer.
MOST_LOSSES = 3
# The others wait while the first certifies held-out images. Ray sees by itself that a worker is gone.
PATIENCE = timedelta(days=1)


def train_on_workers(
    options: TrainingOptions,
    recipe: Recipe,
    *,
    progress: Progress,
    certified: Callable[[Row], None],
    note: Callable[[str], None],
) -> None:
    """Train with `options.workers` workers, until the checkpoint is written.

    A worker that is lost (killed, its machine gone) ends the attempt; all start again from the last saved state.
    Raises what a worker raised for the user's sake, `InterruptedRunError` after SIGTERM or SIGINT, or `TrainingError`
    after `MOST_LOSSES` attempts that saved nothing.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own choice, 15, leaves workers behind all else that runs
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nothing here heeds its notices
    import ray

    if options.download:
        for split in ("train", "test") if options.held_out else ("train",):
            load_dataset(options.dataset, options.data_dir, split, download=True)
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        with stop_requests() as stop_requested:
            _attempts(options, recipe, stop_requested, {"progress": progress, "certified": certified, "note": note})
    finally:
        if started:
            ray.shutdown()


def _attempts(
    options: TrainingOptions,
    recipe: Recipe,
    stop_requested: Callable[[], bool],
    hear: Hear,
) -> None:
    """Attempt after attempt, until one comes to the end."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    options, scaling = _placed(options)
    folder = options.run_folder.folder
    losses, saved = 0, _saved(options)
    while True:
        failure = _attempt(options, recipe, scaling, stop_requested, hear)
        if failure is None:
            return
        if not isinstance(failure, TrainingFailedError | RayError):
            raise failure
        of_workers: dict[int, Exception] = getattr(failure, "worker_failures", {})
        for error in of_workers.values():
            if isinstance(error, MacerError):
                raise error from failure
        if stop_requested():
            raise _interrupted(folder) from failure
        log.info("%s", failure)
        losses, saved = (losses + 1, saved) if _saved(options) == saved else (1, _saved(options))
        what = "; ".join(f"worker {rank}: {first_line(error)}" for rank, error in of_workers.items())
        what = what or first_line(getattr(failure, "controller_failure", failure))
        if losses == MOST_LOSSES:
            raise TrainingError(
                f"the workers failed {losses} times without progress ({what}). What was saved is kept in {folder}: "
                "run the same command again to continue. macer -v train ... says more of the failures."
            ) from failure
        log.warning("lost workers (%s): all continue from the last saved state", what)


def _placed(options: TrainingOptions) -> tuple[TrainingOptions, ScalingConfig]:
    """The options as each worker gets them, and what each takes of the cluster.

    Raises `ParameterError` where the cluster has not as many GPUs or cores: Ray would wait for them.
    """
    import ray
    from ray.train import ScalingConfig

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cores, gpus = [int(m.get("CPU", 0)) for m in machines], sum(int(m.get("GPU", 0)) for m in machines)
    device = options.device or ("cuda" if gpus else "cpu")
    use_gpu = device.startswith("cuda")
    if options.workers > (gpus if use_gpu else sum(cores)):
        there = f"{gpus} GPUs" if use_gpu else f"{sum(cores)} CPU cores"
        raise ParameterError(f"--workers {options.workers} needs one each, and the cluster has {there}")
    most = max(1, cores_each(cores, options.workers))
    threads = options.threads or most
    options = replace(
        options,
        device="cuda" if use_gpu else device,
        threads=threads,
        data_dir=options.data_dir.absolute(),
        out=options.out.absolute(),
        init=_absolute(options.init),
        restart=False,
        download=False,
    )
    each = {"GPU": 1} if use_gpu else {"CPU": min(threads, most)}
    return options, ScalingConfig(num_workers=options.workers, use_gpu=use_gpu, resources_per_worker=each)


def cores_each(machines: list[int], workers: int) -> int:
    """The most cores that each worker can have on machines of so many, 0 where one is left without."""
    fitting = (each for each in range(max(machines), 0, -1) if sum(cores // each for cores in machines) >= workers)
    return next(fitting, 0)


def _attempt(
    options: TrainingOptions,
    recipe: Recipe,
    scaling: ScalingConfig,
    stop_requested: Callable[[], bool],
    hear: Hear,
) -> BaseException | None:
    """One start of all workers, to the end of the run or of the attempt: None, or what ended it.

    Raises `InterruptedRunError` where the run is to stop and the workers do not save and end in time.
    """
    desk, failures = new_desk(), list[BaseException]()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(options, recipe, scaling, desk, Path(scratch))

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failures.append(error)

        # In a thread of its own: in the main thread Ray Train answers SIGINT, by ending the workers as they are.
        fitting = threading.Thread(target=fit, daemon=True)
        fitting.start()
        listening = Listening(desk, hear)
        while fitting.is_alive():
            fitting.join(REPORTS)
            listening.once(stop_requested())
            if fitting.is_alive() and listening.in_vain:
                raise _interrupted(options.run_folder.folder)
    return failures[0] if failures else None


def _trainer(
    options: TrainingOptions, recipe: Recipe, scaling: ScalingConfig, desk: Any, scratch: Path
) -> TorchTrainer:
    """What starts the workers; Ray Train wants a folder, `scratch`, for checkpoints of its own."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _work,
        train_loop_config={"options": options, "recipe": recipe, "desk": desk, "level": log.getEffectiveLevel()},
        torch_config=TorchConfig(timeout_s=int(PATIENCE.total_seconds())),
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
    """What each worker does."""
    import ray.train
    import ray.train.torch
    import torch

    logging.getLogger().setLevel(config["level"])
    context = ray.train.get_context()
    options, group = config["options"], Group(context.get_world_rank(), context.get_world_size())
    if options.device == "cuda":
        torch.cuda.set_device(ray.train.torch.get_device())
    reports, agreement = Reports(config["desk"], group), Agreement()
    try:
        train_here(
            options,
            config["recipe"],
            group,
            stop_requested=lambda: agreement(reports.stop),
            progress=reports.progress,
            certified=reports.certified,
            note=reports.note,
        )
    except InterruptedRunError as error:
        reports.interrupted(error)
        raise


def _interrupted(folder: Path) -> InterruptedRunError:
    return InterruptedRunError(
        f"stopped; what was saved last is kept in {folder}. Run the same command again to continue."
    )


def _saved(options: TrainingOptions) -> list[str]:
    return [path.name for path in options.run_folder.states()]


def _absolute(checkpoint: str | None) -> str | None:
    if checkpoint is None or checkpoint.startswith("bundled:"):
        return checkpoint
    return str(Path(checkpoint).expanduser().absolute())
