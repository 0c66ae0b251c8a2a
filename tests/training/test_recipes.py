"""Recipes are the published ones, constant by constant, and refuse what no run could use."""

from __future__ import annotations

import math
from typing import Any

import pytest

from macer_serve.errors import ParameterError
from training.recipes import recipe

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
    assert (r.k, r.lam, r.defer) == (1, 0.0, 0)


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
        ({"method": "adversarial"}, "method must be one of gaussian, macer"),
    ],
)
def test_constants_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        recipe("cifar10", "macer", 0.25).with_options(**options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"unknown method 'smoothmix'; choose one of: gaussian, macer"):
        recipe("cifar10", "smoothmix", 0.25)


@pytest.mark.parametrize("option", [{"k": 4}, {"lam": 2.0}, {"gamma": 4.0}, {"beta": 8.0}, {"defer": 3}])
def test_options_that_the_method_would_not_use_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=f"method gaussian has no {next(iter(option))}"):
        recipe("cifar10", "gaussian", 0.25).with_options(**option)


# (k, steps, epsilon, lr, milestones, batch a step, epochs); Salman et al. 2019, Table 5 and their public code.
SMOOTHADV = {
    ("cifar10", 0.25): (8, 10, 255 / 256, 0.1, (50, 100), 32, 150),
    ("cifar10", 0.5): (8, 2, 2.0, 0.1, (50, 100), 32, 150),
    ("cifar10", 1.0): (2, 10, 2.0, 0.1, (50, 100), 128, 150),
    ("imagenet", 0.5): (1, 1, 255 / 256, 0.1, (30, 60), 256, 90),
    ("imagenet", 1.0): (1, 1, 2.0, 0.1, (30, 60), 256, 90),
}


@pytest.mark.parametrize(("dataset", "sigma"), SMOOTHADV)
def test_published_constants_of_smoothadv(dataset: str, sigma: float) -> None:
    r = recipe(dataset, "smoothadv", sigma)
    assert (r.k, r.attack_steps, r.epsilon, r.lr, r.milestones, r.batch, r.epochs) == SMOOTHADV[dataset, sigma]
    assert (r.attack, r.ramp, r.momentum, r.weight_decay) == ("pgd", 10, 0.9, 1e-4)


def test_a_shorter_run_ramps_sooner() -> None:
    assert recipe("cifar10", "smoothadv", 0.25).with_options(epochs=30).ramp == 2


@pytest.mark.parametrize("option", [{"epsilon": -1.0}, {"attack_steps": -1}, {"attack": "guess"}, {"ramp": -1}])
def test_an_attack_outside_its_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="recipe: "):
        recipe("cifar10", "smoothadv", 0.25).with_options(**option)
