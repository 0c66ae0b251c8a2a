"""The option that names a file with an issuer's secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from macer_serve.cli.options import Command


def _secret(ctx: click.Context, param: click.Parameter, value: Path | None) -> bytes | None:
    from macer_serve.smoothing.seeds import read_secret

    return None if value is None else read_secret(value)


def secret_option(purpose: str) -> Callable[[Command], Command]:
    """Adds `--secret-file`: the command gets the parameter `secret`, the secret in that file, or None."""
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option("--secret-file", "secret", type=kind, callback=_secret, help=purpose)
