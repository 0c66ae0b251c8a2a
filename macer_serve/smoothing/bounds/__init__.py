"""The bounds that a plan may name: how bounds on class probabilities become a certificate.

Each bound is a file of its own and an entry of `BOUNDS`. It owns its share of alpha, its radius, its stopping rules
and its words. See `macer_serve.smoothing.bounds.base.Bound`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from macer_serve.errors import ParameterError

if TYPE_CHECKING:
    from macer_serve.smoothing.bounds.base import Bound

# Bounds by name. Each module has `BOUND`. Modules are imported when a bound is used: `macer --help` reads the names.
BOUNDS = {
    "one-sided": "macer_serve.smoothing.bounds.one_sided",
    "two-sided": "macer_serve.smoothing.bounds.two_sided",
    "soft": "macer_serve.smoothing.bounds.soft",
}


def bound_named(name: str) -> Bound:
    """Returns the bound of that name. Raises `ParameterError` if there is none."""
    if not isinstance(name, str) or name not in BOUNDS:
        raise ParameterError(f"there is no bound {name!r}; choose one of: {', '.join(BOUNDS)}")
    return _loaded(name)


@cache
def _loaded(name: str) -> Bound:
    bound: Bound = import_module(BOUNDS[name]).BOUND
    return bound
