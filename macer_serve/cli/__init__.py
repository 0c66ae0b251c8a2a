"""The `macer` command: one thin file per subcommand, imported only when the subcommand is called."""

from __future__ import annotations

import importlib
import keyword
import logging
import os
import sys
from typing import Any

import click

from macer_serve.cli.exit_codes import exit_code
from macer_serve.errors import MacerError
from macer_serve.version import __version__

_COMMANDS = {
    "serve": "Serve certified inference over HTTP.",
    "pack": "Decode and resize the images of a tree for training.",
    "train": "Train a base classifier for smoothing.",
    "import": "Make a checkpoint of your own network.",
    "certify": "Certify a data set and write a log.",
    "report": "Tabulate certification logs.",
    "predict": "Certify images, without a server.",
    "verify": "Check a certificate that someone issued.",
    "key": "Make and check the key that certificates are issued with.",
    "export": "Write a base classifier as an ONNX file.",
    "hierarchy": "Print or replace the groups of a checkpoint's classes.",
    "quantize": "Add an int8 form of its network to a checkpoint.",
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them, so that `macer --help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = f"{name}_" if keyword.iskeyword(name) else name
        command: click.Command = importlib.import_module(f"macer_serve.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MacerError as error:
            options = ", ".join(f"--{name.rstrip('_').replace('_', '-')}" for name in error.settings)
            click.echo(f"macer: {error}" + (f" ({options})" if options else ""), err=True)
            ctx.exit(exit_code(error))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="macer")
@click.option("-v", "--verbose", is_flag=True, help="Log what is chosen and why.")
def main(verbose: bool) -> None:
    """Certified inference by randomized smoothing: serve, train, import, certify, report, predict, verify, export."""
    # Before torch is loaded: threads that spin while they wait take the cores from whatever else runs here, and two
    # such programs bring each other to a standstill.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr, force=True
    )
