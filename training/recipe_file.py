"""Recipes as YAML files: data set, architecture, noise, and the phases of a run with every constant.

    dataset: cifar10
    architecture: resnet20-s2
    sigma: 0.25
    phases:
    - method: gaussian
      epochs: 20
      ...
    - method: consistency
      ...

The first phase starts from random weights, or from those that `init` names. Each later phase starts from the weights
that the phase before it ended with. Imports no torch: the command reads a recipe before anything heavy is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from macer_serve.datasets import DATASETS
from macer_serve.errors import ParameterError
from macer_serve.training.methods import METHODS
from macer_serve.training.recipe import Recipe

SUFFIXES = (".yaml", ".yml")
_NAMED = Path(__file__).with_name("named_recipes")
_MAX_BYTES = 1 << 20
_TOP = ("about", "dataset", "architecture", "sigma", "init", "phases")


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """What a recipe file says, and its text. `architecture` None is the data set's usual one.

    `init` names the weights that the first phase starts from, None for random weights. All phases have one sigma.
    """

    dataset: str
    architecture: str | None
    sigma: float
    init: str | None
    phases: tuple[Recipe, ...]
    text: str


def named_recipes() -> dict[str, Path]:
    """Returns the recipe files that come with this package, by name."""
    return {path.stem: path for path in sorted(_NAMED.glob("*.yaml"))}


def read_recipe(path: Path) -> RecipeFile:
    """Returns the recipe of a file. Raises `ParameterError` naming the file and what in it is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ParameterError(f"{path} is too long for a recipe", settings=("recipe",))
        text = data.decode()
        document = yaml.load(text, _Loader)  # a SafeLoader: nothing in the file is executed
    except OSError as error:
        raise ParameterError(f"{path} cannot be read: {error.strerror or error}", settings=("recipe",)) from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        words = " ".join(str(error).split())
        raise ParameterError(f"{path} is not YAML: {words}", settings=("recipe",)) from error
    try:
        return _recipe_file(document, text)
    except ParameterError as error:
        raise ParameterError(f"{path}: {error}", settings=("recipe",)) from error


def write_recipe(
    dataset: str, architecture: str, phases: tuple[Recipe, ...], *, init: str | None = None, about: str = ""
) -> str:
    """Returns the text of a recipe file that names every constant of all phases, which share one sigma."""
    top = {"about": about or None, "dataset": dataset, "architecture": architecture, "sigma": phases[0].sigma}
    document: dict[str, Any] = {name: value for name, value in {**top, "init": init}.items() if value is not None}
    document["phases"] = [{name: v for name, v in phase.to_json().items() if name != "sigma"} for phase in phases]
    return yaml.dump(document, Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice, of which YAML would drop one, and reads 1e-4 as a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _recipe_file(document: Any, text: str) -> RecipeFile:
    top = _mapping(document, "a recipe", _TOP)
    for name in ("about", "dataset", "architecture", "init"):
        if not isinstance(top.get(name), str | None):
            raise ParameterError(f"{name} must be text, not {top[name]!r}")
    for name in ("dataset", "sigma", "phases"):
        if top.get(name) is None:
            raise ParameterError(f"{name} is missing")
    if top["dataset"] not in DATASETS:
        raise ParameterError(f"unknown dataset {top['dataset']!r}; choose one of: {', '.join(DATASETS)}")
    sigma = _constant("sigma", top["sigma"], float)
    phases = top["phases"]
    if not isinstance(phases, list) or not phases:
        raise ParameterError("phases must be a list of one phase or more")
    return RecipeFile(
        dataset=top["dataset"],
        architecture=top.get("architecture"),
        sigma=sigma,
        init=top.get("init"),
        phases=tuple(_phase(phase, number, sigma) for number, phase in enumerate(phases, start=1)),
        text=text,
    )


def _phase(phase: Any, number: int, sigma: float) -> Recipe:
    try:
        method = phase.get("method") if isinstance(phase, dict) else None
        if not isinstance(method, str) or method not in METHODS:
            raise ParameterError(f"method must be one of: {', '.join(METHODS)}")
        kind = METHODS[method].recipe
        own = {one.name: one for one in fields(kind) if one.name != "sigma"}
        given = _mapping(phase, f"a phase of {method}", ("method", *own))
        if missing := [name for name, one in own.items() if one.default is MISSING and name not in given]:
            raise ParameterError(f"{', '.join(missing)} must be given")
        types = get_type_hints(kind)
        constants = {name: _constant(name, value, types[name]) for name, value in given.items() if name != "method"}
        return kind(sigma=sigma, **constants)
    except ParameterError as error:
        raise ParameterError(f"phase {number}: {str(error).removeprefix('recipe: ')}") from error


def _mapping(value: Any, what: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    """Returns the mapping. Raises `ParameterError` for anything else, and for names that are not known."""
    if not isinstance(value, dict):
        raise ParameterError(f"{what} must be names with values, not {type(value).__name__}")
    if unknown := [str(name) for name in value if name not in known]:
        raise ParameterError(f"{what} has no {', '.join(unknown)}; it has {', '.join(known)}")
    return value


def _constant(name: str, value: Any, kind: Any) -> Any:
    """Returns a value as the type of its constant. Raises `ParameterError` if it is of another."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and (whole or isinstance(value, float)):
        return float(value)
    if (kind is int and whole) or (kind is bool and isinstance(value, bool)):
        return value
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ParameterError(f"{name} must be one of: {', '.join(get_args(kind))}, not {value!r}")
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_constant(name, one, int) for one in value)
    words = {float: "a number", int: "a whole number", bool: "true or false"}.get(kind, "a list of whole numbers")
    raise ParameterError(f"{name} must be {words}, not {value!r}")
