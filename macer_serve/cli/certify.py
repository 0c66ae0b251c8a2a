"""`macer certify`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from macer_serve.cli.data_options import data_options
from macer_serve.cli.plan_options import plan_of, plan_options
from macer_serve.cli.voter_options import voter_options, voter_options_of

if TYPE_CHECKING:
    from macer_serve.smoothing.noise import NoiseKind
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
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Private key file (macer key new): its owner's noise, in place of a seed's.",
)
@click.option(
    "--coarse",
    is_flag=True,
    help="Certify groups where no class is to be expected.  [default: classes only, as published logs]",
)
@voter_options
@click.option("--workers", "ray_workers", type=click.IntRange(1), help="Certify on this many workers of a Ray cluster.")
@click.option(
    "--address",
    help="HOST:PORT of the cluster's head, or auto.  [default: RAY_ADDRESS, or a cluster of this machine]",
)
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
    noise: NoiseKind,
    seed: str,
    key: Path | None,
    coarse: bool,
    ray_workers: int | None,
    address: str | None,
    **options: Any,
) -> None:
    """Certify the test images of a data set with CHECKPOINT (a folder, or bundled:NAME) and write a log.

    The log's settings are in a file beside it, LOG.json. An interrupted log is continued by the same command. On
    many workers, CHECKPOINT and --data-dir must have the same path on all machines.
    """

    from tqdm import tqdm

    from macer_serve.checkpoint import load_config
    from macer_serve.datasets import load_dataset
    from macer_serve.errors import LogError, ParameterError
    from macer_serve.evaluation.certify import image_indices, issuer_of, rows_of, write_rows
    from macer_serve.evaluation.classes import require_same_classes
    from macer_serve.evaluation.logs import LogWriter, Row
    from macer_serve.smoothed import SmoothedClassifier
    from macer_serve.smoothing.noise import noise_for

    if address and ray_workers is None:
        raise click.UsageError("say how many workers of the cluster to take (--workers)")
    plan = plan_of(options)
    voter = voter_options_of(options)
    images = load_dataset(dataset, data_dir, "test", download=download, share=split)
    config = load_config(checkpoint)
    require_same_classes(config, images)
    indices = image_indices(len(images), every=every, start=start, stop=stop)
    if coarse and config.hierarchy is None:
        raise ParameterError(f"{checkpoint} has no hierarchy: write one into it, or certify classes only")
    plan = SmoothedClassifier(config if coarse else replace(config, hierarchy=None)).policy_plan(plan)
    issuer = issuer_of(seed, key)
    with ExitStack() as opened:
        if ray_workers is None:
            classifier = SmoothedClassifier.load(
                checkpoint, noise=noise, issuer=issuer, options=voter, hierarchy=coarse
            )
            assert classifier.voter is not None
            engine, rows = classifier.voter.engine, rows_of(classifier, images, plan)
        else:
            from macer_serve.evaluation.ray_workers import Job, WorkerPool
            from macer_serve.ray_cluster import ray_cluster

            opened.enter_context(ray_cluster(address))
            job = Job(checkpoint, dataset, data_dir, split, noise, seed, key, coarse, plan, voter)
            pool = opened.enter_context(WorkerPool(job, ray_workers))
            engine, rows = pool.engine, pool.rows
        settings = {
            "checkpoint": config.digest,
            "dataset": dataset,
            "start": indices.start,
            "stop": indices.stop,
            "every": indices.step,
            "sigma": config.sigma,
            "n0": plan.n0,
            "n": plan.n,
            "alpha": plan.alpha,
            "plan": plan.kind,
            **_beyond_cohen(plan),
            "noise": noise_for(noise, config.sigma).name,
            **({"seed": seed} if issuer.key_id is None else {"key_id": issuer.key_id}),
            "engine": engine,
        }
        try:
            log = opened.enter_context(LogWriter.open(out, settings))
        except LogError as error:
            raise LogError(f"{error} (--out)") from error
        scores = [row.radius if row.correct else 0.0 for row in log.rows]
        done = sum(idx in log.done for idx in indices)
        bar = opened.enter_context(tqdm(total=len(indices), initial=done, unit="image", file=sys.stderr))

        def progress(row: Row) -> None:
            scores.append(row.radius if row.correct else 0.0)
            bar.set_postfix(ACR=f"{sum(scores) / len(scores):.4f}", refresh=False)
            bar.update(1)

        write_rows(rows, indices, log, progress=progress)
    click.echo(f"wrote {out}  ({len(scores)} images, ACR {sum(scores) / max(1, len(scores)):.4f})")


def _beyond_cohen(plan: Plan) -> dict[str, Any]:
    """Returns what a plan has beyond Cohen's CERTIFY, for the log's settings."""
    stops: dict[str, Any] = {"radius": plan.radius, "tolerance": plan.tolerance, "beta": plan.soft_beta}
    if plan.hierarchy is not None:
        stops["hierarchy"] = json.dumps(plan.hierarchy.to_json(), ensure_ascii=False)
    bound = {} if plan.bound == "one-sided" else {"bound": plan.bound}
    return {**{name: value for name, value in stops.items() if value is not None}, **bound}
