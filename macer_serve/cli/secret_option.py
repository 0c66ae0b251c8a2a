"""The option for the file that holds an issuer's secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from macer_serve.cli.options import Command


def _secret(ctx: click.Context, param: click.Parameter, value: Path | None) -> bytes | None:
    from macer_serve.smoothing.seeds import read_secret

    return None if value is None else read_secret(value)


def secret_option(purpose: str) -> Callable[[Command], Command]:
    """Returns a decorator that adds `--secret-file`. The command gets the secret in that file as `secret`, or None."""
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option("--secret-file", "secret", type=kind, callback=_secret, help=purpose)
