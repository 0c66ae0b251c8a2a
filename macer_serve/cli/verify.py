"""`macer verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from macer_serve.cli.image_arguments import image_of
from macer_serve.cli.secret_option import secret_option

if TYPE_CHECKING:
    from macer_serve.voters import Voter


@click.command("verify")
@click.argument("certificate", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("image")
@click.option("--checkpoint", default="bundled:cifar10", show_default=True, help="A folder, or bundled:NAME.")
@secret_option("The issuer's secret: checks the mac, and counts the record's votes again.")
@click.option(
    "--votes",
    type=click.IntRange(0, 10**7),
    default=10_000,
    show_default=True,
    help="Fresh votes, if the record's own cannot be counted again; 0 draws none.",
)
@click.option(
    "--device", default=None, help="cpu or cuda.  [default: the device of the record's engine, if this machine has one]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(
    certificate: Path,
    image: str,
    checkpoint: str,
    secret: bytes | None,
    votes: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Check a CERTIFICATE (a JSON record, or an answer of POST /predict that holds one) about an IMAGE.

    IMAGE is a file, or - for standard input. Every value that follows from other values of the record is computed
    again. The record is compared with the image and the checkpoint. With the issuer's secret, the record's mac and
    votes are checked, too. Without the secret, fresh votes are drawn. They contradict a record whose claim is clearly
    too high. They contradict a true claim with probability at most 0.001.

    \b
    Exit codes:
      0   everything that was checked holds
      10  inconsistent or forged: fields that do not follow, a wrong mac, or other votes
      11  about another image or checkpoint
      12  contradicted by fresh votes
      2   not a certificate, or a parameter out of range; 3 checkpoint, 7 voter, 8 image cannot be used
    """
    import json

    from tqdm import tqdm

    from macer_serve.checkpoint import load_config
    from macer_serve.smoothed import SmoothedClassifier
    from macer_serve.smoothing.noise import NoiseKind
    from macer_serve.verification import read_certificate, verify
    from macer_serve.verification.engines import options_like
    from macer_serve.verification.reading import MAX_BYTES

    with certificate.open("rb") as file:  # one byte more than allowed is enough to refuse a large file
        record, answer = read_certificate(file.read(MAX_BYTES + 1))
    config = load_config(checkpoint)

    def voter(noise: NoiseKind) -> Voter:
        options = options_like(record.engine, config.input_shape[1] * config.input_shape[2], device)
        classifier = SmoothedClassifier.load(checkpoint, noise=noise, options=options)
        assert classifier.voter is not None
        return classifier.voter

    with tqdm(unit="vote", file=sys.stderr, leave=False, delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify(
            record,
            image_of(image),
            config,
            answer=answer,
            secret=secret,
            votes=votes,
            voter=voter,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        for finding in report.findings:
            click.echo(f"{finding.outcome:<14} {finding.check}: {finding.words}")
        if report.error is None:
            click.echo(report.verdict)
    if report.error is not None:
        raise report.error
