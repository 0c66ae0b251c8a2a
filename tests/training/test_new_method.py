"""A new training method is one new file and one line of the table: options, recipes and loop follow from them."""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor

import macer_serve.cli.train
import macer_serve.training.recipes
from macer_serve.cli import main
from macer_serve.datasets import DATASETS
from macer_serve.training.method import Logits, Method, Step, Sums
from macer_serve.training.methods import METHODS
from macer_serve.training.recipe import Recipe, constant

Train = Callable[..., Result]


@dataclass(frozen=True, slots=True)
class AgreementRecipe(Recipe):
    method: ClassVar[str] = "agreement"

    k: int = constant(2, "noisy copies per image")
    pull: float = constant(1.5, "weight of the agreement of the copies")


def agreement(
    model: Logits, images: Tensor, labels: Tensor, recipe: AgreementRecipe, step: Step
) -> tuple[Tensor, Sums]:
    """The file of a new method, in the tests."""
    copies = images.repeat_interleave(recipe.k, 0)
    noise = torch.randn(copies.shape, generator=step.generator)
    logits = model(copies + recipe.sigma * noise).float()
    spread = logits.view(len(images), recipe.k, -1).softmax(-1).var(1).sum(1).mean()
    loss = F.cross_entropy(logits, labels.repeat_interleave(recipe.k)) + recipe.pull * spread
    return loss, {"loss": loss * len(labels), "spread": spread.detach() * len(labels)}


def named(dataset: str, sigma: float) -> Recipe:
    return AgreementRecipe(sigma, 2, 16, 0.01, 1e-4)


METHOD = Method(AgreementRecipe, agreement, {"published": named, "fast": named}, lambda dataset, sigma: "ours")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table with one line more, and what is made of it when the command starts."""
    made: tuple[ModuleType, ...] = (macer_serve.training.recipes, macer_serve.cli.train)
    monkeypatch.setitem(METHODS, "agreement", METHOD)
    for module in made:
        importlib.reload(module)
    yield
    monkeypatch.undo()
    for module in made:
        importlib.reload(module)


@pytest.mark.usefixtures("added")
def test_a_new_method_is_one_file_and_one_line(mnist: Path, train: Train, tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["train", "--help"]).output
    assert "[gaussian|consistency|macer|smoothadv|agreement]" in told
    assert "agreement: weight of the agreement of the copies" in " ".join(told.split())
    how = ("--dataset", "mnist", "--method", "agreement", "--pull", 0.5, "--data-dir", mnist, "--out", tmp_path / "out")
    result = train(*how)
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["recipe"]
    assert (recipe["method"], recipe["k"], recipe["pull"]) == ("agreement", 2, 0.5)
    assert "lam" not in recipe
    assert "spread" in json.loads((tmp_path / "out.run" / "log.jsonl").read_text().splitlines()[0])
    refused = train(*how, "--lam", 3)
    assert (refused.exit_code, "method agreement has no lam" in refused.output) == (2, True)


def test_constants_of_one_name_mean_the_same_kind_of_value() -> None:
    """They share one option of the command."""
    kinds: dict[str, set[type]] = {}
    for method in METHODS.values():
        for own in fields(method.recipe):
            if own.name in method.constants():
                kinds.setdefault(own.name, set()).add(type(own.default))
    assert all(len(kind) == 1 for kind in kinds.values()), kinds


@pytest.mark.parametrize("name", DATASETS)
def test_a_tree_is_a_tree_after_pickling(name: str) -> None:
    """Workers get data sets and options as pickles."""
    info = DATASETS[name]
    copy = pickle.loads(pickle.dumps(info))
    assert copy == info
    assert copy.is_tree == info.is_tree == (name in ("imagenet", "folder"))
