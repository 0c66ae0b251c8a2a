"""Plans: how many votes a certification may take, at which counts it may stop, and how alpha is spent."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from macer_serve.errors import ParameterError
from macer_serve.smoothing.binomial import check_alpha
from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.confidence import Budget
from macer_serve.smoothing.hierarchy import Hierarchy
from macer_serve.smoothing.votes import Votes

Mode = Literal["certify", "predict"]

# Below this, floating-point errors of the bounds could exceed alpha, and no plan has the votes to certify anything.
MIN_ALPHA = 1e-12

# Looks by (kind, soft): the first, then each this much further than the one before, by at least one vote. A tolerance
# is rarely reached early. A look at soft votes costs more, so that there are fewer.
LOOKS = {("radius", False): (16, 1.02), ("tolerance", False): (100, 1.05)}
LOOKS |= {("radius", True): (64, 1.1), ("tolerance", True): (100, 1.1)}


@dataclass(frozen=True)
class Plan:
    """n0 selection votes choose a class, at most n fresh estimation votes bound its probability.

    Without `radius` or `tolerance` this is Cohen's CERTIFY: all of `alpha` is spent at one look, after `n` votes;
    a run stopped before it has proved nothing. With one of them the run may stop at any of its looks, `alpha` split
    between an anytime-valid mixture and Clopper-Pearson at n:

    `radius=r` decides whether the radius is at least r. The run stops when that is proved, or hopeless.
    `tolerance=t` stops once more votes are not expected to add more than t to the radius.

    `bound` is a name of `BOUNDS`: `one-sided` (p_B = 1 - p_A), `two-sided` (every other class bounded apart) or `soft`
    (the smoothed classifier is argmax of E softmax(beta * logits), `beta` its inverse temperature). `mode="predict"` is
    Cohen's PREDICT: the class alone, by the two-sided binomial test of the top two counts of n votes.

    With a `hierarchy` a group of classes is certified if no class is likely to be. A smoothed classifier takes its
    checkpoint's, for hard votes. `coarse=False` hides such claims: the answer is then an abstention.
    Raises `ParameterError` at construction for values outside their range.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    radius: float | None = None
    tolerance: float | None = None
    bound: str = "one-sided"
    beta: float = 16.0
    mode: Mode = field(default="certify")
    hierarchy: Hierarchy | None = None
    coarse: bool = True

    def __post_init__(self) -> None:
        self._take_numpys_numbers()
        check_alpha(self.alpha)
        if self.alpha < MIN_ALPHA:
            raise ParameterError(f"alpha must be at least {MIN_ALPHA:g}, not {self.alpha:g}")
        if type(self.n0) is not int or not 1 <= self.n0 <= 10**6:
            raise ParameterError(f"n0 must lie between 1 and 1,000,000 and be an integer, not {self.n0!r}")
        if type(self.n) is not int or not 1 <= self.n <= 10**7:
            raise ParameterError(f"n must lie between 1 and 10,000,000 and be an integer, not {self.n!r}")
        if self.radius is not None and self.tolerance is not None:
            raise ParameterError("radius and tolerance are two plans: give one of them")
        for name, value in (("radius", self.radius), ("tolerance", self.tolerance), ("beta", self.beta)):
            if value is not None and not 0.0 < value < 1000.0:
                raise ParameterError(f"{name} must lie strictly between 0 and 1000, not {value!r}")
        bound_named(self.bound)
        if self.mode not in ("certify", "predict"):
            raise ParameterError(f"there is no mode {self.mode!r}; choose certify or predict")
        if self.mode == "predict" and (self.kind != "fixed" or self.bound != "one-sided"):
            raise ParameterError("predict takes n and alpha only: it has no radius to stop at")
        if self.hierarchy is not None and (self.mode == "predict" or self.soft):
            raise ParameterError("predict and the soft bound take no hierarchy: a soft group needs votes of its own")
        if type(self.coarse) is not bool:
            raise ParameterError(f"coarse must be true or false, not {self.coarse!r}")

    def _take_numpys_numbers(self) -> None:
        """Replace NumPy's numbers by Python's, which records can hold. Other values stay as they are."""
        for name in ("n0", "n", "alpha", "radius", "tolerance", "beta"):
            value = getattr(self, name)
            if isinstance(value, np.integer | np.floating):
                object.__setattr__(self, name, value.item())

    @property
    def kind(self) -> Literal["fixed", "radius", "tolerance"]:
        if self.radius is not None:
            return "radius"
        return "fixed" if self.tolerance is None else "tolerance"

    @property
    def selection(self) -> int:
        """The number of selection votes. PREDICT needs none."""
        return 0 if self.mode == "predict" else self.n0

    @property
    def soft(self) -> bool:
        """Whether the plan takes soft votes."""
        return bound_named(self.bound).soft

    @property
    def soft_beta(self) -> float | None:
        """The inverse temperature of soft votes; None for hard votes."""
        return self.beta if self.soft else None

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """The numbers of estimation votes at which the run may stop, ascending."""
        if self.kind == "fixed":
            return (self.n,)
        at, growth = LOOKS[self.kind, self.soft]
        looks = []
        while at < self.n:
            looks.append(at)
            at = max(at + 1, int(at * growth))
        return (*looks, self.n)

    @property
    def alpha_fractions(self) -> dict[str, float]:
        """What each confidence bound may spend, as fractions of alpha.

        A two-sided or soft plan shares each part between p_A and the runner-up's probability.
        """
        if self.mode == "predict":
            return {"binomial-test": 1.0}
        return bound_named(self.bound).alpha_fractions(fixed=self.kind == "fixed")

    @property
    def alpha_split(self) -> dict[str, float]:
        """What each confidence bound may spend of alpha."""
        return {name: fraction * self.alpha for name, fraction in self.alpha_fractions.items()}

    @cached_property
    def budget(self) -> Budget:
        """The number of votes and the split of alpha, for bounds. PREDICT has no such budget."""
        return Budget(self.n, self.alpha_split)

    def totals(self, votes: Votes, level: int) -> Votes:
        """Returns the votes of each group of a level of the hierarchy; at level 0 the votes of each class."""
        return votes if self.hierarchy is None else self.hierarchy.totals(votes, level)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as certificates carry it. The looks are no part of it: a proof holds at any of them."""
        return {
            "kind": self.kind,
            "mode": self.mode,
            "bound": self.bound,
            "n0": self.selection,
            "n": self.n,
            "alpha": self.alpha,
            "radius": self.radius,
            "tolerance": self.tolerance,
            "beta": self.soft_beta,
            "alpha_split": self.alpha_split,
            "hierarchy": None if self.hierarchy is None else self.hierarchy.to_json(),
            "coarse": self.coarse,
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Returns the plan that `to_json` wrote. Raises `ParameterError` if the record is no plan of this version."""
        try:
            plan = cls(
                n0=data["n0"] or 1,
                n=data["n"],
                alpha=data["alpha"],
                radius=data["radius"],
                tolerance=data["tolerance"],
                bound=data["bound"],
                mode=data["mode"],
                hierarchy=None if data["hierarchy"] is None else Hierarchy.from_json(data["hierarchy"]),
                coarse=data["coarse"],
                **({} if data["beta"] is None else {"beta": data["beta"]}),
            )
        except (TypeError, KeyError) as error:
            raise ParameterError(f"not a plan: {error}") from error
        if plan.to_json() != data:
            raise ParameterError("not a plan of this version: its alpha split differs")
        return plan
