"""`macer certify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from macer_serve.cli.data_options import data_options
from macer_serve.cli.plan_options import plan_of, plan_options
from macer_serve.cli.voter_options import voter_options, voter_options_of

if TYPE_CHECKING:
    from macer_serve.smoothing.plan import Plan


@click.command("certify")
@click.argument("checkpoint")
@data_options()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The log (TSV).")
@click.option("--every", type=click.IntRange(1), default=1, show_default=True, help="Certify every K-th test image.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="First image.")
@click.option("--stop", type=click.IntRange(0), default=None, help="Stop before this image.")
@plan_options(n=100_000)
@click.option("--noise", type=click.Choice(["exact", "gaussian"]), default="exact", show_default=True)
@click.option("--seed", type=str, default="0", show_default=True, help="The same seed gives the same votes.")
@voter_options
def command(
    checkpoint: str,
    dataset: str,
    data_dir: Path,
    download: bool,
    split: float | None,
    out: Path,
    every: int,
    start: int,
    stop: int | None,
    noise: str,
    seed: str,
    **options: Any,
) -> None:
    """Certify the test images of a data set with CHECKPOINT (a folder, or bundled:NAME) and write a log.

    The log's settings are in a file beside it, LOG.json. An interrupted log is continued by the same command.
    """

    from tqdm import tqdm

    from macer_serve.checkpoint import load_config
    from macer_serve.datasets import load_dataset
    from macer_serve.errors import LogError
    from macer_serve.evaluation.certify import certify_dataset, image_indices
    from macer_serve.evaluation.classes import require_same_classes
    from macer_serve.evaluation.logs import LogWriter, Row
    from macer_serve.issuing import EvaluationSeed
    from macer_serve.smoothed import SmoothedClassifier

    plan = plan_of(options)
    images = load_dataset(dataset, data_dir, "test", download=download, share=split)
    require_same_classes(load_config(checkpoint), images)
    indices = image_indices(len(images), every=every, start=start, stop=stop)
    classifier = SmoothedClassifier.load(
        checkpoint,
        noise=noise,  # type: ignore[arg-type]  # click has checked the choice
        issuer=EvaluationSeed.named(seed),
        options=voter_options_of(options),
    )
    config, voter = classifier.config, classifier.voter
    assert voter is not None
    settings = {
        "checkpoint": config.digest,
        "dataset": dataset,
        "sigma": config.sigma,
        "n0": plan.n0,
        "n": plan.n,
        "alpha": plan.alpha,
        "plan": plan.kind,
        **_beyond_cohen(plan),
        "noise": classifier.noise.name,
        "seed": seed,
        "engine": voter.engine,
    }
    try:
        writer = LogWriter.open(out, settings)
    except LogError as error:
        raise LogError(f"{error} (--out)") from error
    with writer as log:
        scores = [row.radius if row.correct else 0.0 for row in log.rows]
        with tqdm(
            total=len(indices), initial=sum(i in log.done for i in indices), unit="image", file=sys.stderr
        ) as bar:

            def progress(row: Row) -> None:
                scores.append(row.radius if row.correct else 0.0)
                bar.set_postfix(ACR=f"{sum(scores) / len(scores):.4f}", refresh=False)
                bar.update(1)

            certify_dataset(classifier, images, indices, plan, log, progress=progress)
    click.echo(f"wrote {out}  ({len(scores)} images, ACR {sum(scores) / max(1, len(scores)):.4f})")


def _beyond_cohen(plan: Plan) -> dict[str, Any]:
    """Returns what a plan has beyond Cohen's CERTIFY, for the log's settings."""
    stops = {"radius": plan.radius, "tolerance": plan.tolerance, "beta": plan.soft_beta}
    bound = {} if plan.bound == "one-sided" else {"bound": plan.bound}
    return {**{name: value for name, value in stops.items() if value is not None}, **bound}
