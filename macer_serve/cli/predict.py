"""`macer predict`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from macer_serve.cli.image_arguments import image_of
from macer_serve.cli.plan_options import plan_of, plan_options
from macer_serve.cli.voter_options import voter_options, voter_options_of

if TYPE_CHECKING:
    from macer_serve.smoothed import SmoothedClassifier
    from macer_serve.smoothing.certificate import Certificate
    from macer_serve.smoothing.plan import Plan


@click.command("predict")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--checkpoint", default="bundled:cifar10", show_default=True, help="A folder, or bundled:NAME.")
@plan_options(n=10_000)
@click.option(
    "--mode",
    type=click.Choice(["certify", "predict"]),
    default="certify",
    show_default=True,
    help="predict: the class alone, without a radius.",
)
@click.option("--coarse/--no-coarse", default=True, show_default=True, help="Name a group if no class is certified.")
@click.option("--noise", type=click.Choice(["exact", "gaussian"]), default="exact", show_default=True)
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Private key file (macer key new): signs certificates and determines their noise.  [default: random noise]",
)
@voter_options
@click.option("--json", "as_json", is_flag=True, help="Print the certificates, one line of JSON per image.")
def command(
    images: tuple[str, ...],
    checkpoint: str,
    mode: str,
    coarse: bool,
    noise: str,
    key: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Certify images (PNG, JPEG or WebP files; - is standard input): class and radius, or an abstention.

    Answers are printed in the order of the images.
    """
    from macer_serve.issuing import Issuer
    from macer_serve.smoothed import SmoothedClassifier

    if images.count("-") > 1:
        raise click.UsageError("- stands for standard input, and can be given once")
    plan = plan_of(options, mode=mode, coarse=coarse)
    opened = [(name, image_of(name)) for name in images]
    _check(opened)
    classifier = SmoothedClassifier.load(
        checkpoint,
        noise=noise,  # type: ignore[arg-type]  # click has checked the choice
        issuer=Issuer.load(key) if key else None,
        options=voter_options_of(options),
    )
    for name, image in opened:
        certificate = _certified(classifier, image, plan)
        if as_json:
            record = {"certificate": certificate.to_json(), "certificate_jws": classifier.signed(certificate)}
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            click.echo(f"{name}: {_answer(certificate)}" if len(images) > 1 else _answer(certificate))


def _check(images: list[tuple[str, str | bytes]]) -> None:
    """Raise the error of the first image that cannot be used, before the network is loaded."""
    from macer_serve.errors import UploadError
    from macer_serve.images import DEFAULT_LIMITS
    from macer_serve.inputs import pixels_of

    for name, image in images:
        try:
            pixels_of(image, DEFAULT_LIMITS)
        except UploadError as error:
            if name != "-":  # the error names a file, and bytes have no name
                raise
            raise type(error)(f"standard input: {error}") from error


def _certified(classifier: SmoothedClassifier, image: str | bytes, plan: Plan) -> Certificate:
    """Returns the certificate of an image, with a progress bar on standard error meanwhile."""
    from tqdm import tqdm

    from macer_serve.smoothing.certificate import shown_group
    from macer_serve.smoothing.certification import Certification

    with tqdm(total=plan.selection + plan.n, unit="vote", file=sys.stderr, leave=False) as bar:

        def progress(run: Certification) -> None:
            if not bar.disable:  # what is proved so far: valid even if the run is interrupted
                claim = run.claim()
                label = shown_group(claim, run.plan) or "undecided"
                if claim.class_id is not None:
                    label = classifier.config.classes[claim.class_id]
                bar.set_postfix_str(f"{label}  radius {claim.radius:.6f}", refresh=False)
            bar.update(run.drawn - bar.n)

        return classifier.certify(image, plan, progress=progress)


def _answer(certificate: Certificate) -> str:
    """Returns the answer in words, with its statement on a second line."""
    if certificate.group is not None:
        radii = f"radius {certificate.group_radius:.6f}  upload radius {certificate.group_upload_radius:.6f}"
        return f"a group: {certificate.group}  {radii}\n{certificate.statement}"
    if certificate.abstained:
        return f"abstained: {certificate.reason}"
    radii = f"  radius {certificate.radius:.6f}  upload radius {certificate.upload_radius:.6f}"
    certified = certificate.plan["mode"] == "certify"
    return f"{certificate.label}{radii if certified else ''}\n{certificate.statement}"
