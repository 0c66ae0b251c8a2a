"""One training run from options to checkpoint: data, model, loop, and what the checkpoint records of them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from macer_serve import __version__
from macer_serve.architectures import base_classifier
from macer_serve.checkpoint import CheckpointConfig, load_model, save_checkpoint
from macer_serve.checkpoint.folder import CONFIG, WEIGHTS
from macer_serve.datasets import DatasetInfo, ImageSet, dataset_info, load_dataset
from macer_serve.errors import CheckpointError, ParameterError, TrainingError
from macer_serve.hardware import usable_cores
from training.data import Batches, DeviceBatches, TreeBatches
from training.loop import Precision, Progress, train
from training.recipes import Recipe, recipe
from training.run_state import RunFolder

log = logging.getLogger(__name__)

_DEFAULT_ARCHITECTURE = {
    "cifar10": "resnet110",
    "svhn": "resnet110",
    "mnist": "lenet",
    "imagenet": "resnet50",
    "folder": "resnet50",
}


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """What a run is told besides its recipe. Paths as given; `threads` None means all cores."""

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
    loader_workers: int = 2
    device: str | None = None
    precision: str = "auto"
    compile_: str = "auto"
    threads: int | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "limit", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParameterError(f"--{name} must be at least 1")
        if self.out.name in ("", ".."):
            raise ParameterError(f"--out {self.out} has no name of its own; name the checkpoint folder to write")
        if not 0 <= self.seed < 2**63:
            raise ParameterError("--seed must lie in [0, 2^63)")
        if self.loader_workers < 0:
            raise ParameterError("--workers must not be negative")
        if self.size is not None and not dataset_info(self.dataset).is_tree:
            raise ParameterError("--size applies to --dataset imagenet and folder only")

    def recipe(self, options: dict[str, Any]) -> Recipe:
        """The published recipe with the given options in place of its constants."""
        return recipe(self.dataset, self.method, self.sigma).with_options(**options)


def _input_shape(info: DatasetInfo, size: int | None) -> tuple[tuple[int, int, int], int]:
    """The input shape and the short side to which uploads are brought before the centre crop."""
    assert info.resize is not None
    channels, side, _ = info.input_shape
    if size is None or size == side:
        return info.input_shape, info.resize
    # The same proportion of crop to resized image as at the data set's own size.
    return (channels, size, size), max(size, round(info.resize * size / side))


def _initial(options: TrainingOptions, classes: tuple[str, ...], arch: str) -> tuple[nn.Module, str | None]:
    """The model to start from and the digest of the checkpoint it came from, if any."""
    info = dataset_info(options.dataset)
    shape, _ = _input_shape(info, options.size)
    torch.manual_seed(options.seed)
    model = base_classifier(arch, classes=len(classes), input_shape=shape, mean=info.mean, std=info.std)
    if options.init is None:
        return model, None
    config, start = load_model(options.init)
    if (config.architecture, config.classes, config.mean, config.std) != (arch, classes, info.mean, info.std):
        raise ParameterError(
            f"--init {options.init} is {config.architecture} with {len(config.classes)} classes on "
            f"{config.dataset}; this run needs {arch} with {len(classes)} classes on {options.dataset}"
        )
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError as error:  # a network whose layers depend on the image size
        raise ParameterError(
            f"--init {options.init} takes images of {config.input_shape}, this run's are {shape}"
        ) from error
    return model, config.digest


def _batches(images: ImageSet, options: TrainingOptions, batch: int, device: torch.device) -> Batches:
    if images.arrays() is not None:
        return DeviceBatches(images, batch=batch, seed=options.seed, device=device, limit=options.limit)
    shape, _ = _input_shape(images.info, options.size)
    return TreeBatches(
        images,
        size=shape[1],
        batch=batch,
        seed=options.seed,
        device=device,
        workers=options.loader_workers,
        limit=options.limit,
    )


def _require_free(out: Path) -> None:
    """Refuse what `save_checkpoint` would, before the hours of training and not after them."""
    if out.exists() and not (out.is_dir() and all(p.name in (CONFIG, WEIGHTS) for p in out.iterdir())):
        raise CheckpointError(f"{out} holds other files than a checkpoint's; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    if not os.access(out.parent, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: {out.parent} is not writable")


def run_training(options: TrainingOptions, recipe: Recipe, *, progress: Progress) -> CheckpointConfig:
    """Train and write `options.out`; the configuration written.

    Raises `DataError`, `ParameterError`, `TrainingError`, or `CheckpointError` where `out` is not free.
    """
    _require_free(options.out)
    torch.set_num_threads(options.threads or usable_cores())
    arch = options.arch or _DEFAULT_ARCHITECTURE[options.dataset]
    precision = Precision.choose(options.device, options.precision, options.compile_)
    log.info("device %s, bf16 %s, compiled %s", precision.device, precision.bf16, precision.compiled)
    images = load_dataset(options.dataset, options.data_dir, "train", download=options.download)
    model, init_digest = _initial(options, images.classes, arch)
    identity = {
        "dataset": options.dataset,
        "images": len(images),
        "architecture": arch,
        "recipe": recipe.to_json(),
        "seed": options.seed,
        "limit": options.limit,
        "size": options.size,
        "init": init_digest,
        "precision": precision.to_json(),
        "torch": str(torch.__version__),
    }
    run = RunFolder(options.out.with_name(options.out.name + ".run"))
    if options.restart:
        run.discard()
    entries = train(
        model,
        _batches(images, options, recipe.batch, precision.device),
        recipe,
        seed=options.seed,
        precision=precision,
        run=run,
        identity=identity,
        progress=progress,
    )
    if not entries:
        raise TrainingError(f"{run.log_path} is missing although the run is complete; use --restart to train anew")
    info = images.info
    shape, resize = _input_shape(info, options.size)
    config = CheckpointConfig(
        name=options.out.name,
        architecture=arch,
        classes=images.classes,
        input_shape=shape,
        mean=info.mean,
        std=info.std,
        sigma=recipe.sigma,
        resize=resize,
        weights_digest="sha256:" + "0" * 64,  # save_checkpoint fills it in
        dataset=options.dataset,
        seed=options.seed,
        recipe={**recipe.to_json(), "limit": options.limit, "init": init_digest, "precision": precision.to_json()},
        metrics=entries[-1],
        versions={"macer-serve": __version__, "torch": str(torch.__version__)},
    )
    try:
        return save_checkpoint(model, config, options.out)
    except OSError as error:
        raise TrainingError(
            f"{options.out} could not be written ({error}); the training is complete and its state kept in "
            f"{run.folder}. Make room and run the same command again."
        ) from error
