"""`macer predict`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from macer_serve.cli.plan_options import plan_of, plan_options
from macer_serve.cli.voter_options import voter_options, voter_options_of


@click.command("predict")
@click.argument("image", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--checkpoint", default="bundled:cifar10", show_default=True, help="A folder, or bundled:NAME.")
@plan_options(n=10_000)
@click.option(
    "--mode",
    type=click.Choice(["certify", "predict"]),
    default="certify",
    show_default=True,
    help="predict: the class alone, by n votes.",
)
@click.option("--noise", type=click.Choice(["exact", "gaussian"]), default="exact", show_default=True)
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Private key file (macer key new): signs the certificate and determines its noise.  [default: random noise]",
)
@voter_options
@click.option("--json", "as_json", is_flag=True, help="Print the whole certificate.")
def command(
    image: Path,
    checkpoint: str,
    mode: str,
    noise: str,
    key: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Certify one IMAGE (PNG, JPEG, WebP): its class and radius, or an abstention."""
    import json

    from tqdm import tqdm

    from macer_serve.images import DEFAULT_LIMITS
    from macer_serve.inputs import pixels_of
    from macer_serve.issuing import Issuer
    from macer_serve.smoothed import SmoothedClassifier
    from macer_serve.smoothing.certification import Certification

    plan = plan_of(options, mode=mode)
    pixels = pixels_of(image, DEFAULT_LIMITS)  # a bad picture is told before the network is warmed up
    classifier = SmoothedClassifier.load(
        checkpoint,
        noise=noise,  # type: ignore[arg-type]  # click has checked the choice
        issuer=Issuer.load(key) if key else None,
        options=voter_options_of(options),
    )
    with tqdm(total=plan.selection + plan.n, unit="vote", file=sys.stderr, leave=False) as bar:

        def progress(run: Certification) -> None:
            if not bar.disable:  # what is proved so far, valid should it be interrupted
                claim = run.claim()
                label = "undecided" if claim.class_id is None else classifier.config.classes[claim.class_id]
                bar.set_postfix_str(f"{label}  radius {claim.radius:.6f}", refresh=False)
            bar.update(run.drawn - bar.n)

        certificate = classifier.certify(pixels, plan, progress=progress)
    if as_json:
        record = {"certificate": certificate.to_json(), "certificate_jws": classifier.signed(certificate)}
        click.echo(json.dumps(record, indent=2, ensure_ascii=False))
    elif certificate.abstained:
        click.echo(f"abstained: {certificate.reason}")
    elif mode == "predict":
        click.echo(certificate.label)
        click.echo(certificate.statement)
    else:
        click.echo(
            f"{certificate.label}  radius {certificate.radius:.6f}  upload radius {certificate.upload_radius:.6f}"
        )
        click.echo(certificate.statement)
