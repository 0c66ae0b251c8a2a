"""The table of data sets. A new one is one file with `DATASET`, and one entry here."""

from __future__ import annotations

from macer_serve.datasets import cifar10, folder, imagenet, mnist, svhn
from macer_serve.datasets.base import DatasetInfo
from macer_serve.errors import ParameterError

DATASETS: dict[str, DatasetInfo] = {
    module.DATASET.name: module.DATASET for module in (cifar10, mnist, svhn, imagenet, folder)
}


def dataset_info(name: str) -> DatasetInfo:
    """Returns the entry of `DATASETS`. Raises `ParameterError` for an unknown name."""
    try:
        return DATASETS[name]
    except KeyError:
        raise ParameterError(f"unknown data set {name!r}; choose one of: {', '.join(sorted(DATASETS))}") from None
