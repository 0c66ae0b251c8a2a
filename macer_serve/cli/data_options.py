"""The options that choose a data set, the same for every command that reads a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from macer_serve.cli.options import Command, with_options
from macer_serve.datasets import DATASETS


def data_options(*, dataset_default: str | None = None) -> Callable[[Command], Command]:
    """Adds `--dataset`, `--data-dir`, `--download` and `--split`.

    With a default, in words, the data set need not be given.
    """
    where = "Where the data set lies.  [default: the environment's MACER_DATA_DIR]"
    which = dataset_default and f"[default: {dataset_default}]"
    options = (
        click.option("--dataset", type=click.Choice(list(DATASETS)), required=dataset_default is None, help=which),
        click.option("--data-dir", type=click.Path(path_type=Path), required=True, envvar="MACER_DATA_DIR", help=where),
        click.option("--download", is_flag=True, help="Fetch CIFAR-10, SVHN or MNIST into --data-dir first."),
        click.option(
            "--split",
            type=float,
            help="Share of each class's images set aside for tests, if a folder has no val/. The same in all commands.",
        ),
    )
    return with_options(options)
