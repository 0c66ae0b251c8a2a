"""`macer report`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from macer_serve.evaluation.reports import FORMATS

if TYPE_CHECKING:
    from macer_serve.evaluation.logs import Log
    from macer_serve.evaluation.reports import Table


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


def _claim(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return float(value.removeprefix("r="))
    except ValueError:
        raise click.BadParameter("expected a radius, such as r=0.25") from None


def _panels(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",")) if value else ()


@click.command("report")
@click.argument("paths", metavar="LOG...", type=click.Path(path_type=Path), nargs=-1)
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
@click.option(
    "--statement",
    "claim",
    callback=_claim,
    metavar="r=R",
    help="Say what the LOGs, the parts of one data set, prove about it at radius R.",
)
@click.option("--confidence", default="0.99", show_default=True, help="Confidence of a statement.")
@click.option(
    "--population",
    type=click.IntRange(1),
    metavar="SIZE",
    help="Size of a finite population from which the images of a statement were drawn without replacement.",
)
@click.option(
    "--label", "labels", multiple=True, help="What a LOG is called, instead of by its file. One for each LOG."
)
@click.option(
    "--sweep", is_flag=True, help="Average over seeds: LOGs called recipe/seed-N, or alike in label, are one row."
)
@click.option("--format", "format_", type=click.Choice(list(FORMATS)), default="text", show_default=True)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw a figure: a .pdf, .png or .svg file."
)
@click.option(
    "--panels",
    callback=_panels,
    metavar="NAME,...",
    help="What the figure shows: accuracy, probability, votes; of training runs, any metrics.  [default: accuracy; "
    "of training runs, loss, noisy_correct, acr]",
)
def command(
    paths: tuple[Path, ...],
    runs: tuple[str, ...],
    radii: tuple[float, ...] | None,
    span: tuple[int | None, int | None],
    claim: float | None,
    confidence: str,
    population: int | None,
    labels: tuple[str, ...],
    sweep: bool,
    format_: str,
    plot: Path | None,
    panels: tuple[str, ...],
) -> None:
    """Tabulate certification logs: ACR, certified accuracy, abstentions and time.

    Reads the logs of `macer certify` and those published with papers (Cohen's format, CERTIFY and PREDICT), plain or
    compressed by gzip. A LOG may also be a training run (its folder, or its log.jsonl): then all must be.
    """
    from macer_serve.evaluation.training_logs import is_run

    if sweep:
        paths = _runs_of(paths)
    if not paths and not runs:
        raise click.UsageError("name the logs to report on")
    if claim is not None:
        if runs or labels or plot or format_ not in ("text", "json") or span != (None, None):
            raise click.UsageError(
                "a statement is text or JSON about all images: leave out --range, --table3, --label, --plot and others"
            )
        click.echo(_statement(paths, claim, confidence, population, format_))
        return
    if labels and len(labels) != len(paths):
        raise click.UsageError(f"{len(labels)} labels for {len(paths)} logs: give one for each, in order (--label)")
    if panels and plot is None:
        raise click.UsageError("name the file of the figure (--plot)")
    if plot is not None:
        from macer_serve.evaluation.reports.figure import check_suffix

        check_suffix(plot)  # before the logs are read
    if sweep and runs:
        raise click.UsageError("training cost has no average over seeds (--sweep, --table3)")
    of_runs = [is_run(path) for path in paths]
    if any(of_runs):
        if runs or not all(of_runs):
            raise click.UsageError("report on training runs without certification logs beside them")
        table = _of_training(paths, labels, sweep, plot, panels)
    else:
        table = _of_logs(paths, labels, sweep, span, radii, plot, panels, runs)
    click.echo(FORMATS[format_](table))


def _runs_of(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    from macer_serve.evaluation.reports.sweep import with_seeds

    return tuple(with_seeds(paths))


def _of_training(
    paths: Sequence[Path], labels: Sequence[str], sweep: bool, plot: Path | None, panels: Sequence[str]
) -> Table:
    """Returns the table of the runs, and draws their curves."""
    from macer_serve.evaluation.reports.training_runs import training_panels, training_table
    from macer_serve.evaluation.training_logs import read_training_log

    read = [read_training_log(path) for path in paths]
    if labels:
        read = [replace(run, name=label) for run, label in zip(read, labels, strict=True)]
    if plot is not None:
        from macer_serve.evaluation.reports.figure import save_figure

        save_figure(training_panels(read, panels), plot)
    if sweep:
        from macer_serve.evaluation.reports.sweep import run_sweeps, sweep_of

        return run_sweeps(read, labels or [sweep_of(run.name) for run in read])
    return training_table(read)


def _of_logs(
    paths: Sequence[Path],
    labels: Sequence[str],
    sweep: bool,
    span: tuple[int | None, int | None],
    radii: tuple[float, ...] | None,
    plot: Path | None,
    panels: Sequence[str],
    runs: Sequence[str],
) -> Table:
    """Returns the table of the logs, or that of the training cost of `runs`, and draws the logs' figure."""
    from macer_serve.errors import ParameterError
    from macer_serve.evaluation.logs import read_log
    from macer_serve.evaluation.reports.summary_table import summary_table
    from macer_serve.evaluation.summaries import default_radii, restrict, summary, with_images

    found = [restrict(read_log(path), *span) for path in paths]
    notes = [note for log in found for note in log.notes]
    read, left_out = with_images(found)
    for note in notes + left_out:
        click.echo(f"note: {note}", err=True)
    if labels:
        named = dict(zip((log.name for log in found), labels, strict=True))
        read = [replace(log, name=named[log.name]) for log in read]
    if not read and not runs:
        raise ParameterError("no log holds an image to report on")
    if plot is not None:
        _plot_logs(read, plot, panels or ("accuracy",))
    if runs:
        return _table3(runs, read)
    chosen = default_radii(read) if radii is None else radii
    if sweep:
        from macer_serve.evaluation.reports.sweep import log_sweeps, sweep_of

        return log_sweeps(read, [log.name if labels else sweep_of(log.name) for log in read], chosen)
    return summary_table([summary(log, chosen) for log in read])


def _statement(paths: Sequence[Path], radius: float, confidence: str, population: int | None, format_: str) -> str:
    from macer_serve.evaluation.audit import audit, delta_of
    from macer_serve.evaluation.logs import read_log

    found = audit([read_log(path) for path in paths], radius, delta_of(confidence), population=population)
    return json.dumps(found.to_json(), indent=2) if format_ == "json" else found.to_text()


def _plot_logs(logs: Sequence[Log], plot: Path, panels: Sequence[str]) -> None:
    from macer_serve.evaluation.reports.figure import save_figure
    from macer_serve.evaluation.reports.panels import PANELS
    from macer_serve.evaluation.reports.summary_table import short_names

    if unknown := [name for name in panels if name not in PANELS]:
        raise click.UsageError(f"there is no panel {unknown[0]!r}; choose from {', '.join(PANELS)} (--panels)")
    named = [replace(log, name=name) for log, name in zip(logs, short_names(logs), strict=True)]
    save_figure([PANELS[name](named) for name in panels], plot)


def _table3(runs: Sequence[str], logs: Sequence[Log]) -> Table:
    from macer_serve.errors import LogError
    from macer_serve.evaluation.reports import table3

    rows = []
    for run in runs:
        checkpoint, _, log = run.partition("=")
        try:
            rows.append(table3.cost(checkpoint, Path(log) if log else None, logs))
        except LogError as error:
            raise LogError(f"{error} (--table3 CHECKPOINT=LOG.jsonl)") from error
    return table3.table([*table3.PUBLISHED, *rows])
