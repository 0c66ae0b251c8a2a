"""Recipes by name: `published` has constants of the literature, `short` a second set of it, `fast` ours."""

from __future__ import annotations

from macer_serve.datasets import dataset_info
from macer_serve.errors import ParameterError
from macer_serve.training.methods import METHODS
from macer_serve.training.recipe import SHARED, Recipe, nearest_sigma

NAMES = ("published", "short", "fast")
# Every constant that may replace a recipe's own.
OPTIONS = (*SHARED, *dict.fromkeys(name for method in METHODS.values() for name in method.constants()))


def recipe(dataset: str, method: str, sigma: float, name: str = "published") -> Recipe:
    """Returns the recipe of that name. A sigma between the published ones takes the constants of the nearest.

    Raises `ParameterError` for a method or a name that does not exist, or not for this data set.
    """
    if method not in METHODS:
        raise ParameterError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    if name not in NAMES:
        raise ParameterError(f"unknown recipe {name!r}; choose one of: {', '.join(NAMES)}")
    like = dataset_info(dataset).like or dataset
    if name == "short" and like != "cifar10":
        raise ParameterError("recipe short is for CIFAR-10 and SVHN; use published or fast")
    return METHODS[method].recipes[name](like, sigma)


def source(dataset: str, method: str, sigma: float, name: str) -> str:
    """Returns in words whose constants a recipe has."""
    if name == "fast":
        return "ours"
    if name == "short" and method == "macer":
        return "the baseline of Jeong, Kim & Shin 2023" + (" for CIFAR-10" if dataset == "svhn" else "")
    between = "" if nearest_sigma(sigma) == sigma else f"; those of the nearest sigma, {nearest_sigma(sigma):g}"
    info, of_method = dataset_info(dataset), METHODS[method].source
    whose = of_method(dataset, sigma)
    if whose is None and info.like is not None:
        whose = f"ours; those of {of_method(info.like, sigma)} for {dataset_info(info.like).title}"
    return (whose or "ours") + between
