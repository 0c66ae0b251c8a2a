"""One training run from options to checkpoint: data, model, loop, and what the checkpoint records of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from macer_serve.checkpoint import FILES, WEIGHTS, CheckpointConfig, load_config, save_checkpoint
from macer_serve.datasets import DatasetInfo, ImageSet, dataset_info, load_dataset
from macer_serve.errors import CheckpointError, DataError, ParameterError, TrainingError
from macer_serve.evaluation.logs import Row
from macer_serve.hardware import usable_cores
from macer_serve.version import __version__
from macer_serve.training.curves import Curves
from macer_serve.training.data import Batches, DeviceBatches, TreeBatches
from macer_serve.training.held_out import certified_curve
from macer_serve.training.initial import initial_model
from macer_serve.training.loop import Conduct, Progress, train
from macer_serve.training.network import Group
from macer_serve.training.precision import Precision
from macer_serve.training.recipes import Recipe
from macer_serve.training.run_state import RunFolder

log = logging.getLogger(__name__)

_DEFAULT_ARCHITECTURE = {
    "cifar10": "resnet110",
    "svhn": "resnet110",
    "mnist": "lenet",
    "imagenet": "resnet50",
    "folder": "resnet50",
}


# A mean loss so many times that of a network that knows nothing is not learning's.
_DIVERGED = 10.0


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """What a run is told besides its recipe. Paths as given; `threads` None means all cores, shared among workers.

    `held_out` test images are certified at the end, and every `certify_every` epochs where that is given; 0 for none.
    """

    dataset: str
    data_dir: Path
    out: Path
    method: str
    sigma: float
    arch: str | None = None
    init: str | None = None
    download: bool = False
    seed: int = 0
    size: int | None = None
    limit: int | None = None
    loaders: int = 2
    device: str | None = None
    precision: str = "auto"
    compile_: str = "auto"
    threads: int | None = None
    restart: bool = False
    workers: int = 1
    micro_batch: int | None = None
    save_every: int | None = None
    keep: int = 2
    held_out: int = 100
    certify_every: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "limit", "threads", "workers", "micro_batch", "save_every", "keep", "certify_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParameterError(f"--{name.replace('_', '-')} must be at least 1")
        if self.out.name in ("", ".."):
            raise ParameterError(f"--out {self.out} has no name of its own; name the checkpoint folder to write")
        if not 0 <= self.seed < 2**63:
            raise ParameterError("--seed must lie in [0, 2^63)")
        if min(self.loaders, self.held_out) < 0:
            raise ParameterError("--loaders and --held-out must not be negative")
        if self.certify_every is not None and not self.held_out:
            raise ParameterError("--certify-every needs --held-out images to certify")
        if self.size is not None and not dataset_info(self.dataset).is_tree:
            raise ParameterError("--size applies to --dataset imagenet and folder only")

    @property
    def architecture(self) -> str:
        return self.arch or _DEFAULT_ARCHITECTURE[self.dataset]

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(self.out.with_name(self.out.name + ".run"), self.keep)


def _input_shape(info: DatasetInfo, size: int | None) -> tuple[tuple[int, int, int], int]:
    """The input shape and the short side to which uploads are brought before the centre crop."""
    assert info.resize is not None
    channels, side, _ = info.input_shape
    if size is None or size == side:
        return info.input_shape, info.resize
    # The same proportion of crop to resized image as at the data set's own size.
    return (channels, size, size), max(size, round(info.resize * size / side))


def _batches(images: ImageSet, options: TrainingOptions, batch: int, device: torch.device, group: Group) -> Batches:
    seed, limit = options.seed, options.limit
    if images.arrays() is not None:
        return DeviceBatches(images, batch=batch, seed=seed, device=device, limit=limit, group=group)
    shape, _ = _input_shape(images.info, options.size)
    return TreeBatches(
        images,
        size=shape[1],
        batch=batch,
        seed=seed,
        device=device,
        loaders=options.loaders,
        limit=limit,
        group=group,
    )


def _require_free(out: Path) -> None:
    """Refuse what `save_checkpoint` would, before the hours of training and not after them."""
    if out.exists() and not (out.is_dir() and all(p.name in FILES for p in out.iterdir())):
        raise CheckpointError(f"{out} holds other files than a checkpoint's; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    if not os.access(out.parent, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: {out.parent} is not writable")


def _held_out(options: TrainingOptions, classes: tuple[str, ...]) -> ImageSet | None:
    """The test split, asked for before the hours of training and not after them."""
    if not options.held_out:
        return None
    try:
        images = load_dataset(options.dataset, options.data_dir, "test", download=options.download)
    except DataError as error:
        raise DataError(f"{error} (Held-out images are certified at the end; --held-out 0 goes without.)") from error
    if images.classes != classes:
        raise DataError(
            f"the test split of {options.dataset} has other classes than its training split; --held-out 0 goes without"
        )
    return images


def run_training(
    options: TrainingOptions,
    recipe: Recipe,
    *,
    progress: Progress = lambda epoch, step, steps, metrics: None,
    certified: Callable[[Row], None] = lambda row: None,
    note: Callable[[str], None] = log.info,
) -> CheckpointConfig:
    """Trains and writes `options.out`; returns the configuration written.

    `certified` is called with each held-out image's row, `note` with what the user should know before training.
    Raises `DataError`, `ParameterError`, `TrainingError`, or `CheckpointError` where `out` is not free.
    """
    _require_free(options.out)
    if options.restart:
        options.run_folder.discard()
    if options.workers > 1:
        from macer_serve.training.ray_workers import train_on_workers

        train_on_workers(options, recipe, progress=progress, certified=certified, note=note)
    else:
        train_here(options, recipe, Group(), progress=progress, certified=certified, note=note)
    return load_config(options.out)


def train_here(
    options: TrainingOptions,
    recipe: Recipe,
    group: Group,
    *,
    stop_requested: Callable[[], bool] | None = None,
    progress: Progress = lambda epoch, step, steps, metrics: None,
    certified: Callable[[Row], None] = lambda row: None,
    note: Callable[[str], None] = log.info,
) -> None:
    """This worker's part of a run; the first of the group writes the checkpoint."""
    torch.set_num_threads(options.threads or max(1, usable_cores() // group.size))
    precision = Precision.choose(options.device, options.precision, options.compile_)
    precision.apply()
    log.info("device %s, %s, compiled %s", precision.device, precision.arithmetic, precision.compiled)
    images = load_dataset(options.dataset, options.data_dir, "train", download=options.download)
    held_out = _held_out(options, images.classes)
    shape, _ = _input_shape(images.info, options.size)
    initial = initial_model(
        options.architecture,
        classes=images.classes,
        input_shape=shape,
        info=images.info,
        seed=options.seed,
        init=options.init,
    )
    if initial.note is not None and group.rank == 0:
        note(initial.note)
    folder = options.run_folder
    how = {
        "limit": options.limit,
        "init": initial.digest,
        "precision": precision.to_json(),
        "micro_batch": options.micro_batch,
        "workers": group.size,
    }
    identity = {
        "dataset": options.dataset,
        "images": len(images),
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
            curve = certified_curve(exported, config, held_out, options.held_out, precision, progress=certified)
            folder.log_certified({"epoch": epochs - 1, **curve})
        if curves is not None:
            curves.update()

    conduct = Conduct(
        precision=precision,
        micro_batch=options.micro_batch,
        save_every=options.save_every,
        most_loss=_DIVERGED * recipe.untrained_loss(len(images.classes)),
        group=group,
        stop_requested=stop_requested,
        progress=progress,
        after_epoch=after_epoch,
    )
    batches = _batches(images, options, recipe.batch, precision.device, group)
    try:
        exported = train(
            initial.model, batches, recipe, seed=options.seed, conduct=conduct, folder=folder, identity=identity
        )
    finally:
        if curves is not None:
            curves.close()
    if group.rank == 0:
        _write(exported, config, options, folder)


def _config(options: TrainingOptions, images: ImageSet, recipe: Recipe, how: dict[str, Any]) -> CheckpointConfig:
    """What the checkpoint will say; its weights digest and metrics are filled in when it is written."""
    info = images.info
    shape, resize = _input_shape(info, options.size)
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
        raise TrainingError(f"{folder.log_path} is missing although the run is complete; use --restart to train anew")
    metrics = {**entries[-1], **({"held_out": curves[-1]} if curves else {})}
    try:
        save_checkpoint(model, replace(config, metrics=metrics), options.out)
    except OSError as error:
        raise TrainingError(
            f"{options.out} could not be written ({error}); the training is complete and its state kept in "
            f"{folder.folder}. Make room and run the same command again."
        ) from error
