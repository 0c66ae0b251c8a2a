"""Options that say which data set, and where it lies: the same for every command that reads one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from macer_serve.datasets import DATASETS


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--dataset`, `--data-dir` and `--download`."""
    where = "Where the data set lies.  [default: the environment's MACER_DATA_DIR]"
    options = (
        click.option("--dataset", type=click.Choice(list(DATASETS)), required=True),
        click.option("--data-dir", type=click.Path(path_type=Path), required=True, envvar="MACER_DATA_DIR", help=where),
        click.option("--download", is_flag=True, help="Fetch CIFAR-10, SVHN or MNIST into --data-dir first."),
    )
    for option in reversed(options):
        command = option(command)
    return command
