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
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] else None


@click.command("report")
@click.argument("logs", metavar="LOG...", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--table3",
    "runs",
    multiple=True,
    metavar="CHECKPOINT[=LOG.jsonl]",
    help="Training cost beside ACR, the published rows too; repeat it for more runs. LOGs give the ACR.",
)
@click.option(
    "--radii", callback=_radii, help="Where to give certified accuracy.  [default: 0,0.25,0.5,0.75,... up to 2]"
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

    Reads the logs of `macer certify` and those published with papers (Cohen's format), plain or gzip.
    """
    from macer_serve.evaluation.logs import read_log
    from macer_serve.evaluation.report import as_json, as_table, default_radii, restrict, summary

    if not logs and not runs:
        raise click.UsageError("name the logs to report on")
    read = [restrict(read_log(path), *span) for path in logs]
    if runs:
        click.echo(_table3(runs, read, json_))
        return
    chosen = default_radii(read) if radii is None else radii
    summaries = [summary(log, chosen) for log in read]
    click.echo(as_json(summaries) if json_ else as_table(summaries))


def _table3(runs: tuple[str, ...], logs: list[Log], json_: bool) -> str:
    from macer_serve.evaluation import table3

    rows = []
    for run in runs:
        checkpoint, _, log = run.partition("=")
        rows.append(table3.cost(checkpoint, Path(log) if log else None, logs))
    if json_:
        return json.dumps([asdict(row) for row in rows], indent=2)
    return table3.as_table([*table3.PUBLISHED, *rows])
