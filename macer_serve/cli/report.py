"""`macer report`."""

from __future__ import annotations

import re
from pathlib import Path

import click


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
@click.argument("logs", metavar="LOG...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--radii", callback=_radii, help="Where to give certified accuracy.  [default: 0,0.25,0.5,0.75,... up to 2]"
)
@click.option("--range", "span", callback=_span, metavar="START:STOP", help="Only images START to STOP - 1.")
@click.option("--json", "json_", is_flag=True, help="Print JSON, with the interval of every figure.")
def command(
    logs: tuple[Path, ...], radii: tuple[float, ...] | None, span: tuple[int | None, int | None], json_: bool
) -> None:
    """Tabulate certification logs: ACR, certified accuracy, abstentions and time.

    Reads the logs of `macer certify` and those published with papers (Cohen's format), plain or gzip.
    """
    from macer_serve.evaluation.logs import read_log
    from macer_serve.evaluation.report import as_json, as_table, default_radii, restrict, summary

    read = [restrict(read_log(path), *span) for path in logs]
    chosen = default_radii(read) if radii is None else radii
    summaries = [summary(log, chosen) for log in read]
    click.echo(as_json(summaries) if json_ else as_table(summaries))
