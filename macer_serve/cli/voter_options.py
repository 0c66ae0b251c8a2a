"""The options that choose an engine, the same for every command that draws votes."""

from __future__ import annotations

from typing import Any

import click

from macer_serve.cli.options import Command, with_options
from macer_serve.voters.options import DEVICES, ENGINES, MAX_BATCH, PRECISIONS, VoterOptions


def voter_options(command: Command) -> Command:
    """Adds the options of `VoterOptions`."""
    options = [
        click.option("--engine", type=click.Choice(["auto", *ENGINES]), default="auto", show_default=True),
        click.option("--device", type=click.Choice(DEVICES), help="[default: cuda if there is a GPU, else cpu]"),
        click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True),
        click.option("--batch", type=click.IntRange(1, MAX_BATCH), help="Noisy copies per forward pass."),
        click.option("--cores", "workers", type=click.IntRange(1), help="CPU cores.  [default: all]"),
        click.option("--compile/--no-compile", default=True, show_default=True, help="torch: compile the network."),
    ]
    return with_options(options)(command)


def voter_options_of(options: dict[str, Any]) -> VoterOptions:
    """Returns the voter's options, taken out of `options`."""
    return VoterOptions(**{name: options.pop(name) for name in VoterOptions.names()})
