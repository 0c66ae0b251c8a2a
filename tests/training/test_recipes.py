"""Recipes are the published ones, constant by constant, and refuse what no run could use."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from macer_serve.cli import main
from macer_serve.cli.exit_codes import exit_code
from macer_serve.cli.train import command as train_command
from macer_serve.errors import ParameterError
from macer_serve.training.methods import METHODS as TABLE
from macer_serve.training.methods.consistency import ConsistencyRecipe
from macer_serve.training.methods.macer import MacerRecipe
from macer_serve.training.methods.smoothadv import SmoothAdvRecipe
from macer_serve.training.recipe import SHARED, Recipe
from macer_serve.training.recipes import OPTIONS as ALL_OPTIONS
from macer_serve.training.recipes import recipe, source

# (lam, gamma, beta, k, lr, milestones, weight decay, batch, epochs, defer); Zhai et al. 2020 and their code for
# CIFAR-10, public reproductions of it for MNIST (Jeong & Shin 2020) and ImageNet.
MACER = {
    ("cifar10", 0.25): (12, 8, 16, 16, 0.01, (200, 400), 5e-4, 64, 440, 0),
    ("cifar10", 0.5): (4, 8, 16, 16, 0.01, (200, 400), 5e-4, 64, 440, 0),
    ("cifar10", 1.0): (12, 8, 16, 16, 0.01, (200, 400), 5e-4, 64, 440, 200),
    ("mnist", 0.25): (16, 8, 16, 16, 0.01, (30, 60), 1e-4, 256, 90, 30),
    ("mnist", 0.5): (16, 8, 16, 16, 0.01, (30, 60), 1e-4, 256, 90, 30),
    ("mnist", 1.0): (6, 8, 16, 16, 0.01, (30, 60), 1e-4, 256, 90, 30),
    ("imagenet", 0.25): (6, 8, 16, 2, 0.1, (30, 60, 90), 1e-4, 256, 120, 0),
    ("imagenet", 0.5): (3, 8, 16, 2, 0.1, (30, 60, 90), 1e-4, 256, 120, 0),
    ("imagenet", 1.0): (3, 8, 16, 2, 0.1, (30, 60, 90), 1e-4, 256, 120, 30),
}
# (lr, milestones, weight decay, batch, epochs); Cohen et al. 2019, Jeong & Shin 2020 for MNIST.
GAUSSIAN = {
    "cifar10": (0.1, (50, 100), 1e-4, 256, 150),
    "mnist": (0.01, (30, 60), 1e-4, 256, 90),
    "imagenet": (0.1, (30, 60), 1e-4, 256, 90),
}


@pytest.mark.parametrize(("dataset", "sigma"), MACER)
def test_published_constants_of_macer(dataset: str, sigma: float) -> None:
    r = recipe(dataset, "macer", sigma)
    constants = (r.lam, r.gamma, r.beta, r.k, r.lr, r.milestones, r.weight_decay, r.batch, r.epochs, r.defer)
    assert constants == MACER[dataset, sigma]
    assert (r.method, r.sigma, r.momentum, r.nesterov, r.schedule) == ("macer", sigma, 0.9, False, "step")


@pytest.mark.parametrize("dataset", GAUSSIAN)
@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_published_constants_of_gaussian_augmentation(dataset: str, sigma: float) -> None:
    r = recipe(dataset, "gaussian", sigma)
    assert (r.lr, r.milestones, r.weight_decay, r.batch, r.epochs) == GAUSSIAN[dataset]
    assert (r.method, r.sigma, r.momentum, r.nesterov, r.schedule) == ("gaussian", sigma, 0.9, False, "step")
    assert r.to_json().keys() == {"method", "sigma", *SHARED}, "no constants of other methods"


@pytest.mark.parametrize(("sigma", "published"), [(0.12, 0.25), (0.3, 0.25), (0.45, 0.5), (0.7, 0.5), (0.8, 1.0)])
def test_a_sigma_between_takes_the_constants_of_the_nearest(sigma: float, published: float) -> None:
    near = recipe("cifar10", "macer", published)
    assert recipe("cifar10", "macer", sigma) == near.with_options(sigma=sigma)


def test_milestones_and_deferral_follow_the_length() -> None:
    base = recipe("cifar10", "macer", 1.0)
    half = base.with_options(epochs=220)
    assert (half.epochs, half.milestones, half.defer) == (220, (100, 200), 100)
    assert base.with_options(epochs=1).milestones == (1, 1), "never before the first epoch is done"
    assert base.with_options(epochs=1).defer == 0
    given = base.with_options(epochs=220, milestones=(10, 20), defer=3)
    assert (given.milestones, given.defer) == ((10, 20), 3)
    assert base.with_options(lr=0.5).milestones == (200, 400)
    assert base.with_options(epochs=None, milestones=None) == base
    assert recipe("cifar10", "macer", 0.25).with_options(epochs=220, milestones=(10, 20)).defer == 0


def test_a_deferral_ends_at_the_first_milestone_that_is_given() -> None:
    """The short recipe of the CAT-RS authors: without this its 150 epochs would all be deferred."""
    short = recipe("cifar10", "macer", 1.0).with_options(
        lr=0.1, weight_decay=1e-4, batch=256, epochs=150, milestones=(50, 100)
    )
    assert short.defer == 50
    assert recipe("cifar10", "macer", 1.0).with_options(epochs=44, milestones=()).defer == 20


def test_the_step_schedule() -> None:
    r = recipe("cifar10", "macer", 0.25).with_options(epochs=10, milestones=(2, 5))
    rates = [r.learning_rate(step, 4) for step in range(40)]
    assert rates == pytest.approx([0.01] * 8 + [0.001] * 12 + [0.0001] * 20, rel=1e-12)


def test_the_one_cycle_schedule() -> None:
    r = recipe("cifar10", "gaussian", 0.25).with_options(epochs=2, lr=0.8, schedule="one-cycle", warmup=0.2)
    rates = [r.learning_rate(step, 5) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.6, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15, 0.05], rel=1e-12)
    falling = r.with_options(warmup=0.0)
    assert [falling.learning_rate(step, 5) for step in (0, 9)] == pytest.approx([0.76, 0.04], rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must lie in [0.005, 4]"),
        ({"sigma": 4.1}, "sigma must lie in [0.005, 4]"),
        ({"sigma": math.nan}, "sigma must lie in [0.005, 4]"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive and finite"),
        ({"weight_decay": -1e-9}, "weight_decay must be finite and not negative"),
        ({"weight_decay": math.nan}, "weight_decay must be finite"),
        ({"momentum": 1.0}, "momentum must lie in [0, 1)"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs momentum"),
        ({"schedule": "cosine"}, "schedule must be step or one-cycle"),
        ({"milestones": (0, 5)}, "milestones must be at least 1"),
        ({"warmup": 1.0}, "warmup must lie in [0, 1)"),
        ({"k": 0}, "k must be at least 1"),
        ({"lam": -1.0}, "lam must be finite and not negative"),
        ({"lam": math.nan}, "lam must be finite"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"gamma": math.inf}, "gamma must be positive and finite"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"defer": -1}, "defer must not be negative"),
    ],
)
def test_constants_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        recipe("cifar10", "macer", 0.25).with_options(**options)
    assert message in str(caught.value)
    assert exit_code(caught.value) == 2


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"unknown method 'smoothmix'; choose one of: gaussian, consistency, "):
        recipe("cifar10", "smoothmix", 0.25)


@pytest.mark.parametrize("option", [{"k": 4}, {"lam": 2.0}, {"gamma": 4.0}, {"beta": 8.0}, {"defer": 3}])
def test_options_that_the_method_would_not_use_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=f"method gaussian has no {next(iter(option))}"):
        recipe("cifar10", "gaussian", 0.25).with_options(**option)


# (k, steps, epsilon, lr, milestones, batch a step, epochs); Salman et al. 2019, Table 5 and their public code;
# for MNIST the public code of Jeong & Shin 2020.
SMOOTHADV = {
    ("cifar10", 0.25): (8, 10, 255 / 256, 0.1, (50, 100), 32, 150),
    ("cifar10", 0.5): (8, 2, 2.0, 0.1, (50, 100), 32, 150),
    ("cifar10", 1.0): (2, 10, 2.0, 0.1, (50, 100), 128, 150),
    ("mnist", 0.25): (4, 10, 255 / 256, 0.01, (30, 60), 64, 90),
    ("mnist", 0.5): (4, 10, 255 / 256, 0.01, (30, 60), 64, 90),
    ("mnist", 1.0): (4, 10, 255 / 256, 0.01, (30, 60), 64, 90),
    ("imagenet", 0.5): (1, 1, 255 / 256, 0.1, (30, 60), 256, 90),
    ("imagenet", 1.0): (1, 1, 2.0, 0.1, (30, 60), 256, 90),
}


@pytest.mark.parametrize(("dataset", "sigma"), SMOOTHADV)
def test_published_constants_of_smoothadv(dataset: str, sigma: float) -> None:
    r = recipe(dataset, "smoothadv", sigma)
    assert (r.k, r.attack_steps, r.epsilon, r.lr, r.milestones, r.batch, r.epochs) == SMOOTHADV[dataset, sigma]
    assert (r.attack, r.ramp, r.momentum, r.weight_decay) == ("pgd", 10, 0.9, 1e-4)


@pytest.mark.parametrize("method", ["gaussian", "consistency", "macer", "smoothadv"])
@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_whose_constants_they_are_is_said(method: str, sigma: float) -> None:
    """A recipe of this project's own is never called an author's."""
    for dataset, published in {"cifar10": True, "mnist": True, "svhn": method == "macer", "folder": False}.items():
        whose = source(dataset, method, sigma, "published")
        assert whose.startswith("ours") != published
        assert "nearest" in source(dataset, method, sigma + 0.01, "published")
        assert "nearest" not in whose
        assert source(dataset, method, sigma, "fast") == "ours"
    assert "Jeong & Shin 2020" in source("mnist", method, sigma, "published")
    assert ("lam is ours" in source("imagenet", "macer", sigma, "published")) == (sigma != 0.25)


# (lam, eta, lr, milestones, epochs); Jeong & Shin 2020, the names of their public logs, and their code.
CONSISTENCY = {
    ("cifar10", 0.25): (20, 0.5, 0.1, (50, 100), 150),
    ("cifar10", 0.5): (10, 0.5, 0.1, (50, 100), 150),
    ("cifar10", 1.0): (10, 0.5, 0.1, (50, 100), 150),
    ("mnist", 0.25): (10, 0.5, 0.01, (30, 60), 90),
    ("mnist", 0.5): (5, 0.5, 0.01, (30, 60), 90),
    ("mnist", 1.0): (5, 0.5, 0.01, (30, 60), 90),
    ("imagenet", 0.5): (5, 0.5, 0.1, (30, 60), 90),
    ("imagenet", 1.0): (5, 0.1, 0.1, (30, 60), 90),
}


@pytest.mark.parametrize(("dataset", "sigma"), CONSISTENCY)
def test_published_constants_of_consistency(dataset: str, sigma: float) -> None:
    r = recipe(dataset, "consistency", sigma)
    assert (r.lam, r.eta, r.lr, r.milestones, r.epochs) == CONSISTENCY[dataset, sigma]
    assert (r.k, r.batch, r.momentum, r.weight_decay, r.nesterov) == (2, 256, 0.9, 1e-4, False)
    assert recipe("cifar10", "consistency", 0.12).lam == 20, "the nearest"


@pytest.mark.parametrize("option", [{"k": 1}, {"lam": -1.0}, {"eta": math.nan}, {"eta": -0.5}])
def test_a_consistency_outside_its_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="recipe: "):
        recipe("cifar10", "consistency", 0.25).with_options(**option)


def test_a_shorter_run_ramps_sooner() -> None:
    assert recipe("cifar10", "smoothadv", 0.25).with_options(epochs=30).ramp == 2


@pytest.mark.parametrize("option", [{"epsilon": -1.0}, {"attack_steps": -1}, {"attack": "guess"}, {"ramp": -1}])
def test_an_attack_outside_its_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="recipe: "):
        recipe("cifar10", "smoothadv", 0.25).with_options(**option)


DATASETS = ("cifar10", "svhn", "mnist", "imagenet", "folder")
METHODS = ("gaussian", "consistency", "macer", "smoothadv")
SIGMAS = (0.25, 0.5, 1.0)


@pytest.mark.parametrize(("dataset", "defer"), [("cifar10", 200), ("svhn", 200), ("imagenet", 30), ("folder", 30)])
def test_at_sigma_1_macers_robustness_loss_waits_for_the_first_drop_of_the_rate(dataset: str, defer: int) -> None:
    assert [recipe(dataset, "macer", sigma).defer for sigma in SIGMAS] == [0, 0, defer]
    at_1 = recipe(dataset, "macer", 1.0)
    assert at_1.defer == min(at_1.milestones)
    assert at_1.k_deferred == 0, "as published, every epoch has all copies"


@pytest.mark.parametrize("sigma", SIGMAS)
def test_on_mnist_every_run_of_macer_waits_for_the_first_drop(sigma: float) -> None:
    assert recipe("mnist", "macer", sigma).defer == 30 == min(recipe("mnist", "macer", sigma).milestones)


@pytest.mark.parametrize("dataset", ["cifar10", "svhn"])
@pytest.mark.parametrize(("sigma", "lam", "defer"), [(0.25, 12, 0), (0.5, 4, 0), (1.0, 12, 50)])
def test_the_short_recipe_is_the_published_one_of_150_epochs(
    dataset: str, sigma: float, lam: float, defer: int
) -> None:
    r = recipe(dataset, "macer", sigma, "short")
    assert (r.lr, r.milestones, r.weight_decay, r.batch, r.epochs) == (0.1, (50, 100), 1e-4, 256, 150)
    assert (r.lam, r.gamma, r.beta, r.k, r.defer) == (lam, 8, 16, 16, defer)
    assert (r.momentum, r.nesterov, r.schedule, r.ema, r.label_smoothing, r.k_deferred) == (0.9, False, "step", 0, 0, 0)


@pytest.mark.parametrize("method", ["gaussian", "consistency", "smoothadv"])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_methods_of_150_epochs_have_no_shorter_recipe(method: str, sigma: float) -> None:
    assert recipe("cifar10", method, sigma, "short") == recipe("cifar10", method, sigma)
    assert recipe("cifar10", method, sigma).epochs == 150


@pytest.mark.parametrize("dataset", ["mnist", "imagenet", "folder"])
@pytest.mark.parametrize("method", METHODS)
def test_the_short_recipe_is_refused_where_nothing_of_the_kind_is_published(dataset: str, method: str) -> None:
    with pytest.raises(ParameterError, match="recipe short is for CIFAR-10 and SVHN; use published or fast"):
        recipe(dataset, method, 0.5, "short")


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_fast_recipe_exists_for_everything_and_takes_no_more_passes(
    dataset: str, method: str, sigma: float
) -> None:
    fast, published = recipe(dataset, method, sigma, "fast"), recipe(dataset, method, sigma)
    assert (fast.method, fast.sigma) == (method, sigma)
    if dataset == "mnist":
        assert (fast.epochs, fast.lr, fast.schedule, fast.milestones, fast.ema) == (30, 0.01, "step", (10, 20), 0)
    else:
        assert fast.schedule == "one-cycle"
        assert 0.9 < fast.ema < 1
    for name in ("lam", "gamma", "beta", "eta"):
        assert getattr(fast, name, None) == getattr(published, name, None), "the loss is the same"
    assert passes(fast) <= passes(published)
    if method == "macer":
        assert 0 < fast.defer < fast.epochs
        assert fast.k_deferred == 1


def passes(r: Recipe) -> int:
    """Noisy copies an image in a whole run, with the attack's."""
    if isinstance(r, MacerRecipe):
        return sum(r.copies(epoch) for epoch in range(r.epochs))
    if isinstance(r, SmoothAdvRecipe):
        return r.epochs * r.k * (1 + r.attack_steps)
    return r.epochs * (r.k if isinstance(r, ConsistencyRecipe) else 1)


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("factor", [0.2, 0.5, 2, 3])
def test_the_deferral_of_the_fast_recipe_keeps_its_share_of_the_run(dataset: str, factor: float) -> None:
    fast = recipe(dataset, "macer", 0.5, "fast")
    scaled = fast.with_options(epochs=round(factor * fast.epochs))
    assert scaled.defer == pytest.approx(fast.defer * scaled.epochs / fast.epochs, abs=0.5)
    assert scaled.k_deferred == 1


OPTIONS: dict[str, Any] = {
    "epochs": 7,
    "batch": 3,
    "lr": 0.123,
    "weight_decay": 0.01,
    "momentum": 0.5,
    "nesterov": False,
    "schedule": "step",
    "milestones": (1, 2),
    "warmup": 0.4,
    "label_smoothing": 0.3,
    "ema": 0.0,
    "k": 9,
    "lam": 0.5,
    "gamma": 1.0,
    "beta": 2.0,
    "eta": 0.25,
    "defer": 1,
    "k_deferred": 3,
    "attack": "ddn",
    "epsilon": 0.1,
    "attack_steps": 5,
    "ramp": 23,
}


def test_every_constant_of_a_recipe_is_an_option_of_the_command() -> None:
    constants = {f.name for method in TABLE.values() for f in fields(method.recipe)} - {"sigma"}
    assert set(OPTIONS) == set(ALL_OPTIONS) == constants
    assert constants <= {parameter.name for parameter in train_command.params}


@pytest.mark.parametrize("dataset", ["cifar10", "mnist", "imagenet"])
@pytest.mark.parametrize("method", METHODS)
def test_any_option_replaces_a_constant_of_the_fast_recipe(dataset: str, method: str) -> None:
    fast = recipe(dataset, method, 0.5, "fast")
    usable = [name for name in OPTIONS if name in fast.to_json()]
    others = {**OPTIONS, "nesterov": not fast.nesterov, "schedule": {"step": "one-cycle"}.get(fast.schedule, "step")}
    others["ema"] = 0.5
    for name in usable:
        before, changed = fast.to_json(), fast.with_options(**{name: others[name]})
        assert getattr(changed, name) == others[name] != getattr(fast, name)
        follows = {"epochs": {"milestones", "defer", "ramp"}, "milestones": {"defer"}}.get(name, set())
        assert {n for n, value in changed.to_json().items() if value != before[n]} <= {name, *follows}
    everything = fast.with_options(**{name: others[name] for name in usable})
    assert all(getattr(everything, name) == others[name] for name in usable)


def test_an_unknown_name_of_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"unknown recipe 'slow'; choose one of: published, short, fast"):
        recipe("cifar10", "macer", 0.5, "slow")
    command = ("train", "--dataset", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--recipe")
    for name, why in (("slow", "'slow' is not one of"), ("short", "recipe short is for CIFAR-10 and SVHN")):
        refused = CliRunner().invoke(main, [*command, name])
        assert refused.exit_code == 2
        assert why in refused.output
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must lie in [0, 1)"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie in [0, 1)"),
        ({"ema": 1.0}, "ema must lie in [0, 1)"),
        ({"ema": math.nan}, "ema must lie in [0, 1)"),
        ({"k_deferred": -1}, "k_deferred must not be negative"),
    ],
)
def test_averages_and_smoothing_outside_their_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        recipe("cifar10", "macer", 0.5, "fast").with_options(**option)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["gaussian", "consistency", "smoothadv"])
def test_only_macer_defers(method: str) -> None:
    with pytest.raises(ParameterError, match=f"method {method} has no k_deferred"):
        recipe("cifar10", method, 0.5, "fast").with_options(k_deferred=1)
