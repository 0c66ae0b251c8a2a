"""One worker's part of a training run: data, model, loop, and what the checkpoint records of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from macer_serve.checkpoint import WEIGHTS, CheckpointConfig, save_checkpoint
from macer_serve.datasets import ImageSet
from macer_serve.datasets.packed import load_pack
from macer_serve.errors import TrainingError, first_line
from macer_serve.hardware import usable_cores
from macer_serve.training.curves import Curves
from macer_serve.training.data import Batches, DeviceBatches, TreeBatches, default_loaders
from macer_serve.training.held_out import certified_curve
from macer_serve.training.images import held_out_images, training_images
from macer_serve.training.initial import initial_model
from macer_serve.training.loop import LoopOptions, train
from macer_serve.training.network import Group
from macer_serve.training.options import Callbacks, TrainingOptions
from macer_serve.training.precision import GpuOptions, Precision
from macer_serve.training.recipe import Recipe
from macer_serve.training.run_state import RunFolder
from macer_serve.version import __version__

log = logging.getLogger(__name__)

# An epoch whose mean loss exceeds this multiple of the untrained loss counts as divergence.
_DIVERGED = 10.0


def _batches(
    images: ImageSet,
    options: TrainingOptions,
    batch: int,
    device: torch.device,
    group: Group,
    note: Callable[[str], None],
) -> Batches:
    seed, limit = options.seed, options.limit
    if images.arrays() is not None:
        return DeviceBatches(images, batch=batch, seed=seed, device=device, limit=limit, group=group)
    shape, _ = options.input_shape
    return TreeBatches(
        images,
        size=shape[1],
        batch=batch,
        seed=seed,
        device=device,
        loaders=default_loaders(device, group.size) if options.loaders is None else options.loaders,
        limit=limit,
        group=group,
        note=note,
    )


def train_worker(
    options: TrainingOptions,
    recipe: Recipe,
    group: Group,
    *,
    stop_requested: Callable[[], bool] | None = None,
    callbacks: Callbacks,
) -> None:
    """Trains as one worker of a group; rank 0 writes the checkpoint. Raises what `run.run_training` raises."""
    torch.set_num_threads(options.threads or max(1, usable_cores() // group.size))
    gpu = GpuOptions(options.deterministic, options.cudnn_benchmark, options.cuda_graphs, options.sync_batch_norm)
    precision = Precision.choose(options.device, options.precision, options.compile_, gpu)
    precision.apply()
    log.info("device %s, %s, compiled %s", precision.device, precision.arithmetic, precision.compiled)
    images = training_images(options)
    held_out = held_out_images(options, images.classes)
    initial = initial_model(
        options.architecture,
        classes=images.classes,
        input_shape=options.input_shape[0],
        info=images.info,
        seed=options.seed,
        init=options.init,
    )
    if initial.note is not None and group.rank == 0:
        callbacks.note(initial.note)
    folder = RunFolder(options.folder, options.keep)
    how = {
        "limit": options.limit,
        "split": options.split,
        "init": initial.digest,
        "precision": precision.to_json(),
        "micro_batch": options.micro_batch,
        "workers": group.size,
        **({"earlier": list(options.earlier)} if options.earlier else {}),
        **({} if options.packed is None else {"packed": load_pack(options.packed, options.dataset)[1].source}),
    }
    identity = {
        "dataset": options.dataset,
        "classes": list(images.classes),
        "architecture": options.architecture,
        "recipe": recipe.to_json(),
        "seed": options.seed,
        "size": options.size,
        **how,
        "torch": str(torch.__version__),
    }
    config = _config(options, images, recipe, how)
    curves = Curves(folder) if options.tensorboard and group.rank == 0 else None

    def after_epoch(epochs: int, exported: nn.Module) -> None:
        every = options.certify_every
        due = epochs == recipe.epochs or (every is not None and epochs % every == 0)
        if due and held_out is not None and all(line["epoch"] != epochs - 1 for line in folder.certified()):
            curve = certified_curve(
                exported, config, held_out, options.held_out, precision, progress=callbacks.certified
            )
            folder.log_certified({"epoch": epochs - 1, **curve})
        if curves is not None:
            curves.update()

    loop = LoopOptions(
        precision=precision,
        micro_batch=options.micro_batch,
        save_every=options.save_every,
        most_loss=_DIVERGED * recipe.untrained_loss(len(images.classes)),
        group=group,
        stop_requested=stop_requested,
        progress=callbacks.progress,
        after_epoch=after_epoch,
    )
    batches = _batches(
        images, options, recipe.batch, precision.device, group, callbacks.note if group.rank == 0 else lambda text: None
    )
    if group.rank == 0 and (entries := folder.entries()) and entries[-1]["images"] != batches.images_per_epoch:
        callbacks.note(
            f"the run in {folder.folder} began with {entries[-1]['images']:,} images, and there are now "
            f"{batches.images_per_epoch:,}: it continues with these"
        )
    model = initial.model
    if gpu.sync_batch_norm and group.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if group.rank == 0 and options.recipe_file:
        folder.keep_recipe(options.recipe_file)
    try:
        exported = train(model, batches, recipe, seed=options.seed, options=loop, folder=folder, identity=identity)
    except RuntimeError as error:
        if not (gpu.deterministic and "deterministic" in str(error)):
            raise
        raise TrainingError(
            f"deterministic kernels cannot train this network here: {first_line(error)}", settings=("deterministic",)
        ) from error
    finally:
        if curves is not None:
            curves.close()
    if group.rank == 0:
        _write(exported, config, options, folder)


def _config(options: TrainingOptions, images: ImageSet, recipe: Recipe, how: dict[str, Any]) -> CheckpointConfig:
    """Returns the checkpoint's configuration. Its digest and its metrics are filled in when it is written."""
    info = images.info
    shape, resize = options.input_shape
    return CheckpointConfig(
        name=options.out.name,
        architecture=options.architecture,
        classes=images.classes,
        input_shape=shape,
        mean=info.mean,
        std=info.std,
        sigma=recipe.sigma,
        resize=resize,
        files={WEIGHTS: "sha256:" + "0" * 64},
        dataset=options.dataset,
        seed=options.seed,
        recipe={**recipe.to_json(), **how},
        versions={"macer-serve": __version__, "torch": str(torch.__version__)},
    )


def _write(model: nn.Module, config: CheckpointConfig, options: TrainingOptions, folder: RunFolder) -> None:
    entries, curves = folder.entries(), folder.certified()
    if not entries:
        raise TrainingError(
            f"{folder.log_path} is missing although the run is complete; train anew", settings=("restart",)
        )
    metrics = {**entries[-1], **({"held_out": curves[-1]} if curves else {})}
    try:
        save_checkpoint(model, replace(config, metrics=metrics), options.out)
    except OSError as error:
        raise TrainingError(
            f"{options.out} could not be written ({error}); the training is complete and its state kept in "
            f"{folder.folder}. Make room and run the same command again."
        ) from error
