"""Evaluation and training sets by name: where they lie, what their images look like, how to get them."""

from macer_serve.datasets.base import DatasetInfo, ImageSet, Split
from macer_serve.datasets.loading import load_dataset, read_image, require_present
from macer_serve.datasets.table import DATASETS, dataset_info

__all__ = [
    "DATASETS",
    "DatasetInfo",
    "ImageSet",
    "Split",
    "dataset_info",
    "load_dataset",
    "read_image",
    "require_present",
]
