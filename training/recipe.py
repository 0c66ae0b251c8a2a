"""The constants that all training methods share. Each method's own constants stand in its file.

Imports no torch: the command lists every constant as an option before anything heavy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

from macer_serve.errors import ParameterError

Schedule = Literal["step", "one-cycle"]


def constant(default: Any, meaning: str, *, choices: tuple[str, ...] = ()) -> Any:
    """Returns the dataclass field of a method's constant: its default and the help line of its option."""
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training method with every constant of a run. Each method adds its own constants in a subclass.

    `lr` is the peak learning rate. `schedule="step"` multiplies it by 0.1 at each epoch of `milestones`;
    `"one-cycle"` rises linearly from 0 over the first `warmup` share of all steps and falls linearly to 0.
    `label_smoothing` is the share of a label that is spread over all classes (Szegedy et al. 2016, §7). If `ema` is
    above 0, the checkpoint holds the exponential moving average of the weights, with `ema` as its decay per step.
    Raises `ParameterError` at construction if a constant is outside its range.
    """

    method: ClassVar[str] = ""

    sigma: float
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    momentum: float = 0.9
    nesterov: bool = False
    schedule: Schedule = "step"
    milestones: tuple[int, ...] = ()
    warmup: float = 0.2
    label_smoothing: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        problems = {
            "sigma must lie in [0.005, 4]": not 0.005 <= self.sigma <= 4.0,
            "epochs must be at least 1": self.epochs < 1,
            "batch must be at least 1": self.batch < 1,
            "lr must be positive and finite": not 0 < self.lr < math.inf,
            "weight_decay must be finite and not negative": not 0 <= self.weight_decay < math.inf,
            "momentum must lie in [0, 1)": not 0 <= self.momentum < 1,
            "nesterov needs momentum": self.nesterov and self.momentum == 0,
            "schedule must be step or one-cycle": self.schedule not in ("step", "one-cycle"),
            "milestones must be at least 1": any(epoch < 1 for epoch in self.milestones),
            "warmup must lie in [0, 1)": not 0 <= self.warmup < 1,
            "label_smoothing must lie in [0, 1)": not 0 <= self.label_smoothing < 1,
            "ema must lie in [0, 1)": not 0 <= self.ema < 1,
            **self.problems(),
        }
        for message, wrong in problems.items():
            if wrong:
                raise ParameterError(f"recipe: {message}")

    def problems(self) -> Mapping[str, bool]:
        """Returns the rules of the method's own constants, and whether each is broken."""
        return {}

    def follow(self, scale: float, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the method's own constants that change with the others.

        `scale` is the new number of epochs over the old one. `given` are the constants that the user chose.
        """
        return {}

    def untrained_loss(self, classes: int) -> float:
        """Returns the loss of a network that gives every class the same logit."""
        return math.log(classes)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Returns the learning rate of global step `step`, counted from 0."""
        if self.schedule == "step":
            drops = sum(step // steps_per_epoch >= epoch for epoch in self.milestones)
            return self.lr * 0.1**drops
        total = self.epochs * steps_per_epoch
        done = (step + 0.5) / total
        if done < self.warmup:
            return self.lr * done / self.warmup
        return self.lr * (1.0 - done) / (1.0 - self.warmup)

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def with_options(self, **options: Any) -> Self:
        """Returns this recipe with the options that are not None in place of its own constants.

        If the number of epochs changes, the milestones move in proportion, unless they are given. Raises
        `ParameterError` for a constant that the method does not have: it would be recorded and not used.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if unknown := sorted(given.keys() - {own.name for own in fields(self)}):
            raise ParameterError(f"recipe: method {self.method} has no {', '.join(unknown)}")
        scale = given.get("epochs", self.epochs) / self.epochs
        moved = {"milestones": tuple(max(1, round(m * scale)) for m in self.milestones)}
        return replace(self, **{**moved, **self.follow(scale, given), **given})


# The constants that every method has, `sigma` aside, which chooses the recipe.
SHARED = tuple(own.name for own in fields(Recipe) if own.name != "sigma")


def nearest_sigma(sigma: float) -> float:
    """Returns the published noise level that is nearest to `sigma`."""
    return min((0.25, 0.5, 1.0), key=lambda published: abs(published - sigma))
