"""`macer train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from macer_serve.cli.data_options import data_options

if TYPE_CHECKING:
    from tqdm import tqdm

    from macer_serve.evaluation.logs import Row


def _milestones(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(",") if part)
    except ValueError:
        raise click.BadParameter("expected epochs separated by commas, such as 50,100") from None


@click.command("train")
@data_options()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The checkpoint folder to write.  [default: runs/DATASET-METHOD-sigmaSIGMA]",
)
@click.option("--method", type=click.Choice(["macer", "gaussian", "smoothadv"]), default="macer", show_default=True)
@click.option(
    "--arch",
    default=None,
    help="Base classifier, or torchvision:NAME.  [default: resnet110, lenet or resnet50, by data set]",
)
@click.option("--sigma", type=float, default=0.25, show_default=True, help="Noise, in pixel values in [0, 1].")
@click.option(
    "--recipe",
    "recipe_name",
    type=click.Choice(["published", "short", "fast"]),
    default="published",
    show_default=True,
    help="The constants to start from; the options below replace any of them.",
)
@click.option(
    "--init",
    type=str,
    default=None,
    help="Weights to start from: a checkpoint, or a state dict (.pth, .pt, .safetensors) to fine-tune.",
)
@click.option("--epochs", type=int, help="Milestones move in proportion, unless given.")
@click.option("--batch", type=int)
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--weight-decay", type=float)
@click.option("--momentum", type=float)
@click.option("--nesterov/--no-nesterov", default=None)
@click.option("--schedule", type=click.Choice(["step", "one-cycle"]))
@click.option("--milestones", callback=_milestones, help="Epochs of the x0.1 steps, e.g. 200,400.")
@click.option("--warmup", type=float, help="one-cycle: share of the run in which the rate rises.")
@click.option("--label-smoothing", type=float, help="Share of a label that is spread over all classes.")
@click.option("--ema", type=float, help="Decay a step of the average of the weights that is exported; 0 for none.")
@click.option("--k", type=int, help="MACER, SmoothAdv: noisy copies an image.")
@click.option("--lam", type=float, help="MACER: weight of the robustness loss.")
@click.option("--gamma", type=float, help="MACER: hinge.")
@click.option("--beta", type=float, help="MACER: inverse temperature.")
@click.option("--defer", type=int, help="MACER: epochs before the robustness loss sets in.")
@click.option("--k-deferred", type=int, help="MACER: noisy copies in those epochs; 0 for --k.")
@click.option("--attack", type=click.Choice(["pgd", "ddn"]), help="SmoothAdv: the attack.")
@click.option("--epsilon", type=float, help="SmoothAdv: its L2 norm at most, pixel values in [0, 1].")
@click.option("--attack-steps", type=int, help="SmoothAdv: its steps.")
@click.option("--ramp", type=int, help="SmoothAdv: epochs in which epsilon rises to its value.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--size", type=int, default=None, help="imagenet, folder: side of the training crops and inputs.  [224]")
@click.option("--limit", type=int, default=None, help="Train on this many images only.")
@click.option(
    "--workers", type=int, default=1, show_default=True, help="Train on this many GPUs or CPUs, by Ray Train."
)
@click.option("--loaders", type=int, default=2, show_default=True, help="imagenet, folder: decoding processes.")
@click.option("--micro-batch", type=int, help="Images a pass, where a batch with its copies does not fit in memory.")
@click.option("--save-every", type=int, help="Save every N steps, too, not only after each epoch.")
@click.option("--keep", type=int, default=2, show_default=True, help="Saved states to keep.")
@click.option("--held-out", type=int, default=100, show_default=True, help="Test images certified at the end.")
@click.option("--certify-every", type=int, help="Certify them every N epochs, too.")
@click.option("--tensorboard/--no-tensorboard", default=True, show_default=True, help="Curves in OUT.run/tensorboard.")
@click.option("--device", default=None, help="cpu or cuda.  [default: cuda where there is one]")
@click.option("--precision", type=click.Choice(["auto", "bf16", "tf32", "fp32"]), default="auto", show_default=True)
@click.option("--compile", "compile_", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: all cores]")
@click.option("--restart", is_flag=True, help="Discard an interrupted run of the same --out.")
def command(**options: Any) -> None:
    """Train a base classifier for smoothing and write it as a checkpoint.

    Without further options this is the published recipe of the method. An interrupted run (Ctrl-C, SIGTERM,
    power cut) is continued by the same command, bit for bit.
    """
    from macer_serve.training.recipes import OPTIONS, recipe
    from macer_serve.training.session import TrainingOptions, run_training

    name = options.pop("recipe_name")
    given = {option: options.pop(option) for option in OPTIONS}
    chosen = recipe(options["dataset"], options["method"], options["sigma"], name).with_options(**given)
    out = options.pop("out") or Path("runs") / f"{options['dataset']}-{options['method']}-sigma{options['sigma']:g}"
    settings = TrainingOptions(out=out, **options)
    click.echo(f"{settings.dataset}, {chosen.to_json()}", err=True)
    with _Bars(chosen.epochs, settings.held_out) as bars:
        config = run_training(settings, chosen, progress=bars.step, certified=bars.certified, note=_note)
    if held_out := config.metrics.get("held_out"):
        click.echo(_curve(held_out), err=True)
    click.echo(f"wrote {settings.out}  {config.digest}")


def _note(text: str) -> None:
    click.echo(text, err=True)


class _Bars:
    """Progress on stderr: steps, with what the last epoch gave; then the held-out images."""

    def __init__(self, epochs: int, held_out: int) -> None:
        self.epochs, self.held_out = epochs, held_out
        self.steps: tqdm[Any] | None = None
        self.images: tqdm[Any] | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *raised: object) -> None:
        for bar in (self.images, self.steps):
            if bar is not None:
                bar.close()

    def step(self, epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        from tqdm import tqdm

        if self.steps is None:
            total, done = self.epochs * steps, epoch * steps + step - 1
            self.steps = tqdm(total=total, initial=done, unit="step", file=sys.stderr)
        names = {"loss": "loss", "soft_radius": "radius", "noisy_correct": "right under noise"}
        shown = {label: f"{metrics[name]:.3f}" for name, label in names.items() if name in metrics}
        self.steps.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        self.steps.set_postfix(shown, refresh=False)
        self.steps.update(epoch * steps + step - self.steps.n)  # of many workers not every step is heard of

    def certified(self, row: Row) -> None:
        from tqdm import tqdm

        if self.images is None:
            self.images = tqdm(total=self.held_out, unit="image", desc="certified", file=sys.stderr, leave=False)
        self.images.update(1)
        if self.images.n >= self.held_out:
            self.images.close()
            self.images = None


def _curve(held_out: dict[str, Any]) -> str:
    accuracies = ", ".join(f"{float(r):g}: {100 * a:.1f} %" for r, a in held_out["certified"].items())
    return (
        f"certified, {held_out['images']}, n = {held_out['n']:,}: ACR {held_out['acr']:.4f}, "
        f"abstained {100 * held_out['abstained']:.1f} %, accuracy at radius {accuracies}"
    )
