"""What `macer train` trains: a named recipe, or the phases of a recipe file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from macer_serve.datasets import dataset_info
from macer_serve.errors import ParameterError
from macer_serve.training.recipe import Recipe
from macer_serve.training.recipe_file import SUFFIXES, named_recipes, read_recipe, write_recipe
from macer_serve.training.recipes import NAMES, recipe, source

DEFAULT_METHOD, DEFAULT_SIGMA = "macer", 0.25


@dataclass(frozen=True, slots=True)
class Choice:
    """The phases to train, and what goes with them. `title` says whose the constants are, `text` is a recipe file."""

    dataset: str
    arch: str | None
    init: str | None
    phases: tuple[Recipe, ...]
    title: str
    out: Path
    text: str


class RecipeName(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """The name of a recipe, or the path of a recipe file."""

    name = "recipe"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "NAME|FILE.yaml"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        if isinstance(value, Path) or value in NAMES:
            return value
        if value in named_recipes():
            return named_recipes()[value]
        if value.endswith(SUFFIXES):
            return Path(value)
        known = ", ".join(repr(name) for name in (*NAMES, *named_recipes()))
        raise click.BadParameter(f"{value!r} is not one of {known}, and the name of a file ends in .yaml.", ctx, param)


def choose(name: str | Path, options: dict[str, Any], given: dict[str, Any]) -> Choice:
    """Returns the recipe of that name or file, with the `given` constants in place of its own.

    Takes `dataset`, `method`, `sigma`, `arch` and `init` out of the options. Raises `ParameterError` for what does not
    go with the recipe.
    """
    asked = {option: options.pop(option) for option in ("dataset", "method", "sigma", "arch", "init")}
    if isinstance(name, Path):
        return _of_file(name, asked, given)
    dataset = asked["dataset"]
    if dataset is None:
        raise click.UsageError("Missing option '--dataset'.")
    method, sigma = asked["method"] or DEFAULT_METHOD, DEFAULT_SIGMA if asked["sigma"] is None else asked["sigma"]
    phases = (recipe(dataset, method, sigma, name).with_options(**given),)
    return Choice(
        dataset=dataset,
        arch=asked["arch"],
        init=asked["init"],
        phases=phases,
        title=f"{name} ({source(dataset, method, sigma, name)})",
        out=Path("runs") / f"{dataset}-{method}-sigma{sigma:g}",
        text=_text(dataset, asked["arch"], asked["init"], phases),
    )


def _of_file(path: Path, asked: dict[str, Any], given: dict[str, Any]) -> Choice:
    file = read_recipe(path)
    said = {"dataset": file.dataset, "sigma": file.sigma, "arch": file.architecture, "init": file.init}
    for option, value in asked.items():
        if value is not None and (option == "method" or said[option] not in (None, value)):
            raise ParameterError(
                f"{path} says this itself; leave it out, or change a copy", settings=(option, "recipe")
            )
    phases, text = file.phases, file.text
    arch, init = asked["arch"] or file.architecture, asked["init"] or file.init
    if given and len(phases) > 1:
        raise ParameterError(
            f"{path} has {len(phases)} phases, each with constants of its own; change a copy", settings=tuple(given)
        )
    if given or (arch, init) != (file.architecture, file.init):
        phases = tuple(phase.with_options(**given) for phase in phases)
        text = _text(file.dataset, arch, init, phases)
    return Choice(
        dataset=file.dataset,
        arch=arch,
        init=init,
        phases=phases,
        title=str(path),
        out=Path("runs") / path.stem,
        text=text,
    )


def _text(dataset: str, arch: str | None, init: str | None, phases: tuple[Recipe, ...]) -> str:
    return write_recipe(dataset, arch or dataset_info(dataset).architecture, phases, init=init)
