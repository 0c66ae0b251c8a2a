"""`macer report`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from macer_serve.evaluation.logs import Log


def _radii(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("expected radii separated by commas, such as 0,0.25,0.5") from None


def _span(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int | None, int | None]:
    if value is None:
        return None, None
    match = re.fullmatch(r"([0-9]*):([0-9]*)", value)
    if match is None:
        raise click.BadParameter("expected START:STOP, such as 500:1000 for images 500-999")
    start, stop = (int(part) if part else None for part in match.groups())
    if stop is not None and stop <= (start or 0):
        raise click.BadParameter(f"there is no image from {start or 0} to {stop - 1}")
    return start, stop


@click.command("report")
@click.argument("logs", metavar="LOG...", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--table3",
    "runs",
    multiple=True,
    metavar="CHECKPOINT[=LOG.jsonl]",
    help="Training cost beside ACR, with the published rows. May be repeated. The ACR is that of the LOGs.",
)
@click.option(
    "--radii", callback=_radii, help="Radii of the certified accuracies.  [default: 0,0.25,0.5,0.75,... up to 2]"
)
@click.option("--range", "span", callback=_span, metavar="START:STOP", help="Only images START to STOP - 1.")
@click.option("--json", "json_", is_flag=True, help="Print JSON, with the interval of every figure.")
def command(
    logs: tuple[Path, ...],
    runs: tuple[str, ...],
    radii: tuple[float, ...] | None,
    span: tuple[int | None, int | None],
    json_: bool,
) -> None:
    """Tabulate certification logs: ACR, certified accuracy, abstentions and time.

    Reads the logs of `macer certify` and those published with papers (Cohen's format, CERTIFY and PREDICT), plain or
    compressed by gzip.
    """
    from macer_serve.errors import ParameterError
    from macer_serve.evaluation.logs import read_log
    from macer_serve.evaluation.report import as_json, as_table, default_radii, restrict, summary, with_images

    if not logs and not runs:
        raise click.UsageError("name the logs to report on")
    read, left_out = with_images([restrict(read_log(path), *span) for path in logs])
    for note in [note for log in read for note in log.notes] + left_out:
        click.echo(f"note: {note}", err=True)
    if runs:
        click.echo(_table3(runs, read, json_))
        return
    if not read:
        raise ParameterError("no log holds an image to report on")
    chosen = default_radii(read) if radii is None else radii
    summaries = [summary(log, chosen) for log in read]
    click.echo(as_json(summaries) if json_ else as_table(summaries))


def _table3(runs: tuple[str, ...], logs: list[Log], json_: bool) -> str:
    from macer_serve.errors import LogError
    from macer_serve.evaluation import table3

    rows = []
    for run in runs:
        checkpoint, _, log = run.partition("=")
        try:
            rows.append(table3.cost(checkpoint, Path(log) if log else None, logs))
        except LogError as error:
            raise LogError(f"{error} (--table3 CHECKPOINT=LOG.jsonl)") from error
    if json_:
        return json.dumps([asdict(row) for row in rows], indent=2)
    return table3.as_table([*table3.PUBLISHED, *rows])
