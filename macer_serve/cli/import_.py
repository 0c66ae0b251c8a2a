"""`macer import`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from macer_serve.checkpoint import CheckpointConfig

# What to give for each fact that a file may lack.
OPTIONS = {
    "sigma": "--sigma S",
    "classes": "--classes FILE (one name per line) or --classes NUMBER",
    "input_shape": "--input-shape C,H,W",
    "value_range": "--mean and --std, or --range LOW,HIGH (0,1 if it reads pixel values as they are, 0,255 if bytes)",
}


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """Numbers separated by commas, exactly `count` of them if `count` is given."""

    def __init__(self, kind: type, count: int | None = None) -> None:
        self.name, self.kind, self.count = "numbers", kind, count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.5,0.5,0.5", param, ctx)
        if self.count is not None and len(numbers) != self.count:
            self.fail(f"{value!r}: {self.count} numbers are needed", param, ctx)
        return numbers


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The checkpoint to write.")
@click.option("--sigma", type=float, help="Noise that the network was trained for, in pixel values in [0, 1].")
@click.option("--classes", help="A file with one class name per line, or the number of classes.")
@click.option("--input-shape", type=Numbers(int, 3), metavar="C,H,W", help="If the file does not fix it.")
@click.option("--mean", type=Numbers(float), metavar="M,...", help="Subtracted; one value or one per channel.")
@click.option("--std", type=Numbers(float), metavar="S,...", help="Divided by; one value or one per channel.")
@click.option(
    "--range", "value_range", type=Numbers(float, 2), metavar="LOW,HIGH", help="Black and white, before that."
)
@click.option("--resize", type=int, help="Short side of uploads before the crop.  [default: the input's longer side]")
@click.option("--name", help="Its name in certificates.  [default: that of the folder]")
@click.option("--arch", metavar="torchvision:NAME", help="Whose weights FILE holds, if it is a state dict.")
@click.option("--denoiser", type=click.Path(path_type=Path, dir_okay=False), help="An ONNX file to put in front.")
@click.option("--check-dir", type=click.Path(path_type=Path, file_okay=False), help="Images, one folder per class.")
def command(
    file: Path,
    out: Path,
    arch: str | None,
    denoiser: Path | None,
    check_dir: Path | None,
    classes: str | None,
    **facts: Any,
) -> None:
    """Make a checkpoint of your own network. All commands and the server take it like any other checkpoint.

    FILE is an ONNX classifier, a published .pth.tar of Cohen, Salman or MACER, or the state dict (.pth, .safetensors)
    of a network of torchvision. Nothing in it is executed. What FILE does not say, the options must.

    \b
    macer import net.onnx --sigma 0.25 --classes classes.txt --range 0,1 --out runs/mine
    macer import resnet18.pth --arch torchvision:resnet18 --sigma 0.25 --classes classes.txt \\
        --input-shape 3,224,224 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --out runs/mine
    """
    from macer_serve.errors import MissingFactsError
    from macer_serve.importing import Facts, import_model

    given = Facts(classes=_classes(classes), **facts)
    try:
        config = import_model(file, out, given, arch=arch, denoiser=denoiser)
    except MissingFactsError as error:
        needed = "; ".join(OPTIONS[fact] for fact in error.facts)
        raise MissingFactsError(f"{error}. Give {needed}.", error.facts) from error
    click.echo(f"wrote {out}  {config.digest}")
    if config.outputs == "probabilities":
        click.echo(
            "This network returns probabilities: it ends in a softmax. Its votes are the votes of its logits. The soft "
            "bound needs logits and will be refused."
        )
    if check_dir is not None:
        _check(out, check_dir, config)


def _classes(given: str | None) -> tuple[str, ...] | int | None:
    from macer_serve.checkpoint.limits import MAX_CONFIG_BYTES, read_bytes
    from macer_serve.errors import CheckpointError, ParameterError

    if given is None or given.isdecimal():
        return None if given is None else int(given[:20])  # so many digits are too many classes already
    try:
        lines = read_bytes(Path(given), MAX_CONFIG_BYTES).decode("utf-8-sig").splitlines()
    except (CheckpointError, UnicodeDecodeError) as error:
        raise ParameterError(f"--classes {given}: {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def _check(out: Path, folder: Path, config: CheckpointConfig) -> None:
    """Print the accuracy on noisy copies of the images, with a warning if it is near chance."""
    from tqdm import tqdm

    from macer_serve.evaluation.sanity import labelled_images, noisy_accuracy
    from macer_serve.smoothed import SmoothedClassifier
    from macer_serve.voters import VoterOptions

    images = labelled_images(folder, config.classes, 500)
    classifier = SmoothedClassifier.load(
        out, secret=b"macer import: the noise of checks", options=VoterOptions(compile=False)
    )
    with tqdm(total=len(images), unit="image", file=sys.stderr, leave=False) as bar:
        found = noisy_accuracy(classifier, images, progress=bar.update)
    click.echo(
        f"right on {found.correct} of {found.images} images under noise of sigma {config.sigma:g}: {found.share:.1%} "
        f"(chance {found.chance:.1%})"
    )
    if found.near_chance:
        click.echo(
            "WARNING: this is near chance. Is the normalisation right (--mean, --std, --range)? Are the classes in the "
            "network's order? Was the network trained under noise of this sigma? Otherwise most answers abstain.",
            err=True,
        )
