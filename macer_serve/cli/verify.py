"""`macer verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from macer_serve.voters import Voter


@click.command("verify")
@click.argument("certificate", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("image", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--checkpoint", default="bundled:cifar10", show_default=True, help="A folder, or bundled:NAME.")
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="The issuer's secret: checks the mac, and counts the record's votes again.",
)
@click.option(
    "--votes",
    type=click.IntRange(0, 10**7),
    default=10_000,
    show_default=True,
    help="Fresh votes, where the record's own cannot be counted again; 0: none.",
)
@click.option("--device", default=None, help="cpu or cuda.  [default: that of the record's engine, if it is here]")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(
    certificate: Path,
    image: Path,
    checkpoint: str,
    secret_file: Path | None,
    votes: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Check a CERTIFICATE (a JSON record, or the answer of POST /predict with one in it) about an IMAGE.

    Everything that follows from the record is computed again, and compared with the image and the checkpoint. With
    the issuer's secret, its mac and its votes are checked, too. Without it, fresh votes are drawn: they contradict a
    record whose claim is clearly too high, and a true claim with probability at most 0.001.

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
    from macer_serve.cli.exit_codes import exit_code
    from macer_serve.smoothed import SmoothedClassifier
    from macer_serve.smoothing.noise import NoiseKind
    from macer_serve.verification import read_certificate, verify
    from macer_serve.verification.engines import options_like
    from macer_serve.verification.reading import MAX_BYTES

    with certificate.open("rb") as file:  # of a file of gigabytes, no more than it takes to refuse it
        record, answer = read_certificate(file.read(MAX_BYTES + 1))

    def voter(noise: NoiseKind) -> Voter:
        classifier = SmoothedClassifier.load(checkpoint, noise=noise, options=options_like(record.engine, device))
        assert classifier.voter is not None
        return classifier.voter

    with tqdm(unit="vote", file=sys.stderr, leave=False, delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = verify(
            record,
            image,
            load_config(checkpoint),
            answer=answer,
            secret=secret_file.read_bytes().strip() if secret_file else None,
            votes=votes,
            voter=voter,
            progress=progress,
        )
    if as_json:
        code = 0 if report.error is None else exit_code(report.error)
        click.echo(json.dumps({**report.to_json(), "exit_code": code}, indent=2))
    else:
        for finding in report.findings:
            click.echo(f"{finding.outcome:<14} {finding.check}: {finding.words}")
        if report.error is None:
            click.echo(report.verdict)
    if report.error is not None:
        raise report.error
