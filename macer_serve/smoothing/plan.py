"""Plans: how many votes a certification may take, and at which counts it may answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from macer_serve.errors import ParameterError
from macer_serve.smoothing.bounds import check_alpha


@dataclass(frozen=True, slots=True)
class Plan:
    """Cohen's CERTIFY: n0 selection votes choose the class, n fresh estimation votes bound its probability.

    All of `alpha` is spent at the one look, after `n` estimation votes. A run stopped before it has proved
    nothing and abstains. Raises `ParameterError` at construction for values outside their range.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if type(self.n0) is not int or not 1 <= self.n0 <= 10**6:
            raise ParameterError(f"n0 must lie between 1 and 1,000,000 and be an integer, not {self.n0!r}")
        if type(self.n) is not int or not 1 <= self.n <= 10**7:
            raise ParameterError(f"n must lie between 1 and 10,000,000 and be an integer, not {self.n!r}")

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of estimation votes at which the run may stop, ascending."""
        return (self.n,)

    def to_json(self) -> dict[str, Any]:
        """The plan as certificates carry it; `alpha_split` says at which look how much of alpha is spent."""
        return {
            "kind": "fixed",
            "n0": self.n0,
            "n": self.n,
            "alpha": self.alpha,
            "looks": list(self.looks),
            "alpha_split": {"clopper-pearson": self.alpha},
        }
