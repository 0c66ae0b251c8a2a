"""Recipes: a training method with all its constants, the published ones as defaults.

Sources: Zhai et al. 2020 (MACER), Cohen et al. 2019 (Gaussian augmentation), Salman et al. 2019 (SmoothAdv) and their
public code; for MNIST, the public code of Jeong & Shin 2020, whose runs of MACER are all deferred to the first drop.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from macer_serve.errors import ParameterError

Method = Literal["gaussian", "macer", "smoothadv"]
Schedule = Literal["step", "one-cycle"]
Attack = Literal["pgd", "ddn"]
NAMES = ("published", "short", "fast")
# The constants that each method has beyond those of the optimiser.
METHODS: dict[Method, tuple[str, ...]] = {
    "gaussian": (),
    "macer": ("k", "lam", "gamma", "beta", "defer", "k_deferred"),
    "smoothadv": ("k", "attack", "epsilon", "attack_steps", "ramp"),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every constant of a run. Raises `ParameterError` at construction where one is outside its range.

    `lr` is the peak learning rate. `schedule="step"` multiplies it by 0.1 at each epoch of `milestones`;
    `"one-cycle"` rises linearly from 0 over the first `warmup` share of all steps and falls linearly to 0.
    `label_smoothing` is the share of a label that is spread over all classes (Szegedy et al. 2016, §7). With `ema`
    above 0 the checkpoint holds the exponential moving average of the weights, `ema` its decay a step.
    `k`, `lam`, `gamma`, `beta` are MACER's noisy copies, weight of the robustness loss, hinge and inverse
    temperature; the robustness loss is off during the first `defer` epochs, which take `k_deferred` copies (0: `k`;
    with 1 they are Gaussian augmentation). SmoothAdv, too, takes `k` noisy copies: `attack` moves the image by
    `epsilon` at most (L2, pixel values in [0, 1]) in `attack_steps` steps, the bound rising linearly over the first
    `ramp` epochs.
    """

    method: Method
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
    k: int = 1
    lam: float = 0.0
    gamma: float = 8.0
    beta: float = 16.0
    defer: int = 0
    k_deferred: int = 0
    attack: Attack = "pgd"
    epsilon: float = 0.0
    attack_steps: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        problems = {
            f"method must be one of {', '.join(METHODS)}": self.method not in METHODS,
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
            "k must be at least 1": self.k < 1,
            "lam must be finite and not negative": not 0 <= self.lam < math.inf,
            "gamma must be positive and finite": not 0 < self.gamma < math.inf,
            "beta must be positive and finite": not 0 < self.beta < math.inf,
            "defer must not be negative": self.defer < 0,
            "k_deferred must not be negative": self.k_deferred < 0,
            "attack must be pgd or ddn": self.attack not in ("pgd", "ddn"),
            "epsilon must be finite and not negative": not 0 <= self.epsilon < math.inf,
            "attack_steps and ramp must not be negative": min(self.attack_steps, self.ramp) < 0,
        }
        for message, wrong in problems.items():
            if wrong:
                raise ParameterError(f"recipe: {message}")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of global step `step`, counted from 0."""
        if self.schedule == "step":
            drops = sum(step // steps_per_epoch >= epoch for epoch in self.milestones)
            return self.lr * 0.1**drops
        total = self.epochs * steps_per_epoch
        done = (step + 0.5) / total
        if done < self.warmup:
            return self.lr * done / self.warmup
        return self.lr * (1.0 - done) / (1.0 - self.warmup)

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def untrained_loss(self, classes: int) -> float:
        """The loss of a network that gives every class the same logit: ln(classes), and for MACER the whole hinge."""
        return math.log(classes) + self.lam * self.sigma / 2 * self.gamma

    def copies(self, epoch: int) -> int:
        """Noisy copies an image in that epoch, counted from 0."""
        return self.k_deferred if self.k_deferred and epoch < self.defer else self.k

    def with_options(self, **options: Any) -> Recipe:
        """This recipe with every option that is not None put in its place.

        Shortening or lengthening a run moves the milestones and the deferral in proportion, unless they are
        given; given milestones alone move a deferral to the first of them, where the published ones end.
        Raises `ParameterError` for an option that the method does not know: it would be recorded, and unused.
        """
        given = {name: value for name, value in options.items() if value is not None}
        known, of_a_method = METHODS[self.method], {name for names in METHODS.values() for name in names}
        if unused := sorted(name for name in given if name in of_a_method and name not in known):
            raise ParameterError(f"recipe: method {self.method} has no {', '.join(unused)}")
        scale = given.get("epochs", self.epochs) / self.epochs
        if self.defer and given.get("milestones"):
            given.setdefault("defer", min(given["milestones"]))
        given.setdefault("milestones", tuple(max(1, round(m * scale)) for m in self.milestones))
        given.setdefault("defer", round(self.defer * scale))
        given.setdefault("ramp", round(self.ramp * scale))
        return replace(self, **given)


# What may be given in place of a recipe's own: all of it but what it was chosen by.
OPTIONS = tuple(constant.name for constant in fields(Recipe) if constant.name not in ("method", "sigma"))


def _nearest_sigma(sigma: float) -> float:
    return min((0.25, 0.5, 1.0), key=lambda published: abs(published - sigma))


def recipe(dataset: str, method: str, sigma: float, name: str = "published") -> Recipe:
    """The recipe of that name; for a sigma between the published ones, the constants of the nearest.

    `published` is the method's authors' own; `short`, for CIFAR-10 and SVHN, gives MACER the 150 epochs of the other
    methods (Jeong, Kim & Shin 2023, their baseline); `fast` is ours (`docs/training.md`).
    Raises `ParameterError` for a method or a name that does not exist, or not for this data set.
    """
    if method not in METHODS:
        raise ParameterError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    if name not in NAMES:
        raise ParameterError(f"unknown recipe {name!r}; choose one of: {', '.join(NAMES)}")
    near = _nearest_sigma(sigma)
    # Published recipes there are for these: others take those of the data set that is most like them.
    dataset = {"svhn": "cifar10", "folder": "imagenet"}.get(dataset, dataset)
    published = _published(dataset, method, sigma, near)
    if name == "short":
        return _short(dataset, published)
    return _fast(dataset, published) if name == "fast" else published


def _published(dataset: str, method: str, sigma: float, near: float) -> Recipe:
    if method == "gaussian":
        if dataset == "imagenet":
            return Recipe("gaussian", sigma, 90, 256, 0.1, 1e-4, milestones=(30, 60))
        if dataset == "mnist":
            return Recipe("gaussian", sigma, 90, 256, 0.01, 1e-4, milestones=(30, 60))
        return Recipe("gaussian", sigma, 150, 256, 0.1, 1e-4, milestones=(50, 100))
    if method == "smoothadv":
        return _smoothadv(dataset, sigma, near)
    if dataset == "imagenet":
        lam = {0.25: 6.0, 0.5: 3.0, 1.0: 3.0}[near]
        defer = 30 if near == 1.0 else 0
        return Recipe("macer", sigma, 120, 256, 0.1, 1e-4, milestones=(30, 60, 90), k=2, lam=lam, defer=defer)
    if dataset == "mnist":
        lam = {0.25: 16.0, 0.5: 16.0, 1.0: 6.0}[near]
        return Recipe("macer", sigma, 90, 256, 0.01, 1e-4, milestones=(30, 60), k=16, lam=lam, defer=30)
    lam = {0.25: 12.0, 0.5: 4.0, 1.0: 12.0}[near]
    defer = 200 if near == 1.0 else 0
    return Recipe("macer", sigma, 440, 64, 0.01, 5e-4, milestones=(200, 400), k=16, lam=lam, defer=defer)


def _smoothadv(dataset: str, sigma: float, near: float) -> Recipe:
    """SmoothAdv's. As published, a batch of 256 is made k steps of 256 / k images, each with k noisy copies."""
    epsilon = 255 / 256 if near == 0.25 or (dataset == "imagenet" and near == 0.5) else 512 / 256
    plain = Recipe(
        "smoothadv", sigma, 90, 256, 0.1, 1e-4, milestones=(30, 60), epsilon=epsilon, ramp=10, attack_steps=1
    )
    if dataset == "imagenet":
        return plain
    steps, k = {0.25: (10, 8), 0.5: (2, 8), 1.0: (10, 2)}[near]
    chosen = replace(plain, batch=256 // k, k=k, attack_steps=steps)
    if dataset == "mnist":
        return replace(chosen, lr=0.01)
    return replace(chosen, epochs=150, milestones=(50, 100))


def _short(dataset: str, published: Recipe) -> Recipe:
    if dataset != "cifar10":
        raise ParameterError("recipe short is for CIFAR-10 and SVHN; use published or fast")
    if published.method != "macer":  # 150 epochs already
        return published
    return published.with_options(lr=0.1, weight_decay=1e-4, batch=256, epochs=150, milestones=(50, 100))


def _fast(dataset: str, published: Recipe) -> Recipe:
    """Ours: fewer epochs, and noisy copies only where they pay (`docs/training.md`)."""
    if dataset == "mnist":  # a third of the epochs, at the published rates: higher ones and MACER's loss undo a LeNet
        few = {"macer": {"k": 4, "k_deferred": 1}, "smoothadv": {"k": 1, "attack_steps": 1, "batch": 256}}
        return published.with_options(epochs=30, **few.get(published.method, {}))
    cycle = {"batch": 256, "schedule": "one-cycle", "milestones": (), "nesterov": True, "ema": 0.998}
    epochs = {"cifar10": 150, "imagenet": 30}[dataset]
    if published.method == "gaussian":
        rate, decay = {"cifar10": (0.2, 5e-4), "imagenet": (0.5, 5e-5)}[dataset]
        return published.with_options(**cycle, epochs=epochs, lr=rate, weight_decay=decay)
    if published.method == "smoothadv":  # an attack of few steps; its batches are small, for their copies
        k = min(2, published.k)
        few_steps = {"k": k, "attack_steps": min(2, published.attack_steps), "batch": 256 // k, "ramp": epochs // 9}
        return published.with_options(**{**cycle, **few_steps}, epochs=epochs)
    # Gaussian augmentation first: the robustness loss counts only images that are right, and costs k times as much.
    rate, k, deferred = {"cifar10": (0.1, 16, 50), "imagenet": (0.2, 2, 15)}[dataset]
    two_parts = {"k": k, "defer": deferred, "k_deferred": 1}
    return published.with_options(**cycle, **two_parts, epochs=epochs, lr=rate, weight_decay=1e-4)
