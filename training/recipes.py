"""Recipes by name: `published` has constants of the literature, `short` a second set of it, `fast` ours."""

from __future__ import annotations

from macer_serve.errors import ParameterError
from macer_serve.training.methods import METHODS
from macer_serve.training.recipe import SHARED, Recipe, nearest_sigma

NAMES = ("published", "short", "fast")
# No recipe is published for these: they take that of the data set that is most like them.
_LIKE = {"svhn": "cifar10", "folder": "imagenet"}
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
    like = _LIKE.get(dataset, dataset)
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
    return METHODS[method].source(dataset, sigma) + between
