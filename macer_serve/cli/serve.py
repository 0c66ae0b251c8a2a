"""`macer serve`."""

from __future__ import annotations

import logging
from pathlib import Path

import click


@click.command("serve")
@click.argument("yaml", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--print", "print_yaml", is_flag=True, help="Print the YAML and end, for example to change a copy.")
def command(yaml: Path | None, print_yaml: bool) -> None:
    """Serve the models of a YAML file, or the bundled CIFAR-10 model.

    The file has the format of Serve's deployments; 'serve run' starts it, too. Ctrl-C or SIGTERM ends the server after
    the requests in flight have been answered; a second Ctrl-C ends it at once. SIGHUP has the file read again, and
    deployed without a failed request; one line says whether the new deployment was taken.

    \b
    Exit codes:
      0   ended by Ctrl-C or SIGTERM
      2   a fault in the YAML; 3 checkpoint, 7 voter cannot be used
      9   the port is taken, or the server cannot start
    """
    from macer_serve.serving.environment import prepare

    prepare()
    from macer_serve.serving.deployment import BUNDLED
    from macer_serve.serving.runner import run

    if print_yaml:
        click.echo((yaml or BUNDLED).read_text(encoding="utf-8"), nl=False)
    else:
        run(yaml, verbose=logging.getLogger().isEnabledFor(logging.INFO), tell=click.echo)
