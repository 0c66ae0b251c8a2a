"""Training cost beside certified radius, as in Table 3 of Zhai et al. 2020: published rows, and rows of our runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from macer_serve.checkpoint import CheckpointConfig, load_config, resolve
from macer_serve.errors import ParameterError
from macer_serve.evaluation.logs import Log
from macer_serve.evaluation.reports.table import Table
from macer_serve.evaluation.summaries import describe_images, summary
from macer_serve.evaluation.training_logs import read_training_log

METHOD_NAMES = {
    "gaussian": "Gaussian (Cohen)",
    "consistency": "Consistency (Jeong & Shin)",
    "smoothadv": "SmoothAdv (Salman)",
    "macer": "MACER",
}


@dataclass(frozen=True, slots=True)
class Cost:
    """One row. `seconds` is the mean per epoch, `hours` the sum of all epochs.

    `acr` is the ACR over `image_set`, None if no images were certified.
    """

    data: str
    method: str
    seconds: float
    epochs: int
    hours: float
    acr: float | None
    image_set: str
    how: str


# Table 3: sigma = 0.25, ResNet-110 and ResNet-50. Its ACR are those of images 500-999, the second easiest of twenty
# blocks.
_P100, _FOUR = "1x P100, published", "4x P100, published"
_BLOCK = "images 500-999"
PUBLISHED = (
    Cost("cifar10", METHOD_NAMES["gaussian"], 31.4, 150, 1.31, 0.416, _BLOCK, _P100),
    Cost("cifar10", METHOD_NAMES["smoothadv"], 1990.1, 150, 82.92, 0.538, _BLOCK, _P100),
    Cost("cifar10", METHOD_NAMES["macer"], 504.0, 440, 61.60, 0.556, _BLOCK, _P100),
    Cost("imagenet", METHOD_NAMES["gaussian"], 2154.5, 90, 53.86, 0.470, "", _FOUR),
    Cost("imagenet", METHOD_NAMES["smoothadv"], 7723.8, 90, 193.10, 0.528, "", _FOUR),
    Cost("imagenet", METHOD_NAMES["macer"], 3537.1, 120, 117.90, 0.544, "", _FOUR),
)


def cost(checkpoint: str | Path, training_log: Path | None, logs: Sequence[Log]) -> Cost:
    """Returns the row of a checkpoint, from its training log and from those of `logs` that certify this checkpoint.

    The default training log is the one that `macer train` left beside the checkpoint. The first epoch compiles the
    network; the mean is that of the other epochs, if there are any. Raises `LogError` for a training log that is
    missing or damaged.
    """
    config = load_config(checkpoint)
    epochs = read_training_log(training_log or resolve(checkpoint)).epochs
    seconds = [epoch["seconds"] for epoch in epochs]
    mine = [log for log in logs if log.rows and log.has_radii and log.settings.get("checkpoint") == config.digest]
    images = max(mine, key=lambda log: len(log.rows), default=None)
    return Cost(
        data=config.dataset or "?",
        method=METHOD_NAMES.get(str(config.recipe.get("method")), str(config.recipe.get("method"))),
        seconds=statistics.fmean(seconds[1:] or seconds),
        epochs=len(seconds),
        hours=sum(seconds) / 3600,
        acr=None if images is None else summary(images).acr,
        image_set="" if images is None else describe_images([row.idx for row in images.rows]),
        how=_how(config),
    )


def _how(config: CheckpointConfig) -> str:
    precision = config.recipe.get("precision") or {}
    device = str(precision.get("device", "?"))
    threads = f" {precision['threads']} threads" if "threads" in precision else ""
    limit = config.recipe.get("limit")
    return ", ".join(
        [
            config.architecture,
            f"{device}{threads}",
            "bf16" if precision.get("bf16") else "fp32",
            *(["compiled"] if precision.get("compiled") else []),
            *([f"{limit} images"] if limit else []),
            *(["from another checkpoint"] if config.recipe.get("init") else []),
        ]
    )


def table(rows: Sequence[Cost]) -> Table:
    """Returns the table, one line per row, sorted by data set. Raises `ParameterError` if there are no rows."""
    if not rows:
        raise ParameterError("no run to tabulate")
    ordered = sorted(rows, key=lambda row: row.data)
    return Table(
        titles=["data", "method", "s/epoch", "epochs", "hours", "ACR", "image set", "how"],
        rows=[
            [
                row.data,
                row.method,
                f"{row.seconds:.1f}",
                str(row.epochs),
                f"{row.hours:.2f}",
                "" if row.acr is None else f"{row.acr:.3f}",
                row.image_set,
                row.how,
            ]
            for row in ordered
        ],
        records=[asdict(row) for row in ordered],
        left=frozenset((0, 1, 6, 7)),
        notes=[
            "The published ACR on CIFAR-10 are those of an easy block of images; compare ACR on one image set only."
        ],
    )
