"""The options that make a plan, the same for every command that certifies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from macer_serve.cli.options import Command, with_options
from macer_serve.smoothing.bounds import BOUNDS

if TYPE_CHECKING:
    from macer_serve.smoothing.plan import Plan

NAMES = ("n0", "n", "alpha", "radius", "tolerance", "bound", "beta")


def plan_options(*, n: int) -> Callable[[Command], Command]:
    """Returns a decorator that adds the options of `NAMES`. `n` is the default number of estimation votes."""
    options = [
        click.option("--n0", type=int, default=100, show_default=True, help="Selection votes."),
        click.option("--n", type=int, default=n, show_default=True, help="Estimation votes at most."),
        click.option("--alpha", type=float, default=0.001, show_default=True, help="1 - confidence: 0.001 is 99.9 %."),
        click.option("--radius", type=float, help="Stop when it is decided whether this radius is certified."),
        click.option("--tolerance", type=float, help="Stop when more votes would add at most this to the radius."),
        click.option("--bound", type=click.Choice(list(BOUNDS)), default="one-sided", show_default=True),
        click.option("--beta", type=float, default=16.0, show_default=True, help="soft: inverse temperature."),
    ]
    return with_options(options)


def plan_of(options: dict[str, Any], **more: Any) -> Plan:
    """Returns the plan, its options taken out of `options`. Warns at once if no votes can satisfy the plan.

    Raises `ParameterError` for values outside their range.
    """
    from macer_serve.smoothing.plan import Plan
    from macer_serve.smoothing.proof import too_few_votes

    plan = Plan(**{name: options.pop(name) for name in NAMES}, **more)
    if too_few := too_few_votes(plan):
        click.echo(f"WARNING: every answer will be an abstention. {too_few} (--n)", err=True)
    return plan
