"""What a training run is told besides its recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macer_serve.datasets import dataset_info
from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import Row
from macer_serve.training.recipe import Recipe

WITHOUT_HELD_OUT = "Held-out images are certified at the end. With 0 of them the test split is not needed."

Progress = Callable[[int, int, int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What is called while a run goes on.

    `phase` is called before each phase with its number, counted from 1, and its recipe. `progress` is called at every
    step with the epoch, the step, the steps per epoch and the metrics of the epoch before. `certified` is called with
    the row of each held-out image, `note` with what the user should know before training, and `checked` with the
    number of image files checked so far and their total.
    """

    progress: Progress = lambda epoch, step, steps, metrics: None
    phase: Callable[[int, Recipe], None] = lambda number, recipe: None
    certified: Callable[[Row], None] = lambda row: None
    note: Callable[[str], None] = lambda text: None
    checked: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """The options of a run. `threads` None means all cores, shared among the workers.

    `held_out` test images are certified at the end, and every `certify_every` epochs if that is given; 0 for none.
    `loaders` None takes what the machine has. `packed` is a pack of the training images (`datasets.packed`).
    `split` is the share of the images of a tree that is set aside for tests, if the tree has no test split. The
    checkpoint records `earlier`, the recipes of the phases before this one. The folder of the run keeps
    `recipe_file`, the text of a recipe file.
    """

    dataset: str
    data_dir: Path
    out: Path
    method: str
    sigma: float
    arch: str | None = None
    init: str | None = None
    download: bool = False
    split: float | None = None
    seed: int = 0
    size: int | None = None
    limit: int | None = None
    loaders: int | None = None
    packed: Path | None = None
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
    deterministic: bool = False
    cudnn_benchmark: bool = False
    cuda_graphs: bool = False
    sync_batch_norm: bool = False
    earlier: tuple[dict[str, Any], ...] = ()
    recipe_file: str = ""

    def __post_init__(self) -> None:
        for name in ("size", "limit", "threads", "workers", "micro_batch", "save_every", "keep", "certify_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParameterError(f"{name} must be at least 1", settings=(name,))
        if self.out.name in ("", ".."):
            raise ParameterError(
                f"{self.out} has no name of its own; name the checkpoint folder to write", settings=("out",)
            )
        if not 0 <= self.seed < 2**63:
            raise ParameterError("the seed must lie in [0, 2^63)", settings=("seed",))
        if self.packed is not None and not dataset_info(self.dataset).is_tree:
            raise ParameterError(
                f"{self.dataset} is held in memory; only imagenet and folder are read from packs", settings=("packed",)
            )
        if min(self.loaders or 0, self.held_out) < 0:
            raise ParameterError("loaders and held-out images must not be negative", settings=("loaders", "held_out"))
        if self.certify_every is not None and not self.held_out:
            raise ParameterError(
                "there are no held-out images to certify between epochs", settings=("certify_every", "held_out")
            )
        if self.size is not None and not dataset_info(self.dataset).is_tree:
            raise ParameterError(
                "only the images of imagenet and folder can be brought to a size", settings=("size", "dataset")
            )

    @property
    def architecture(self) -> str:
        return self.arch or dataset_info(self.dataset).architecture

    @property
    def folder(self) -> Path:
        """The folder of the run, beside the checkpoint."""
        return self.out.with_name(self.out.name + ".run")

    @property
    def input_shape(self) -> tuple[tuple[int, int, int], int]:
        """The input shape, and the short side to which uploads are brought before the centre crop."""
        info = dataset_info(self.dataset)
        channels, side, _ = info.input_shape
        if self.size is None or self.size == side:
            return info.input_shape, info.resize
        # The same proportion of crop to resized image as at the data set's own size.
        return (channels, self.size, self.size), max(self.size, round(info.resize * self.size / side))
