"""`macer train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from macer_serve.datasets import DATASETS


def _milestones(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(",") if part)
    except ValueError:
        raise click.BadParameter("expected epochs separated by commas, such as 50,100") from None


@click.command("train")
@click.option("--dataset", type=click.Choice(list(DATASETS)), required=True)
@click.option("--data-dir", type=click.Path(path_type=Path), required=True, help="Where the data set lies.")
@click.option("--download", is_flag=True, help="Fetch CIFAR-10, SVHN or MNIST into --data-dir first.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The checkpoint folder to write.")
@click.option("--method", type=click.Choice(["macer", "gaussian", "smoothadv"]), default="macer", show_default=True)
@click.option("--arch", default=None, help="Base classifier.  [default: resnet110, lenet or resnet50, by data set]")
@click.option("--sigma", type=float, default=0.25, show_default=True, help="Noise, in pixel values in [0, 1].")
@click.option("--init", type=str, default=None, help="Checkpoint whose weights to start from.")
@click.option("--epochs", type=int, help="Milestones move in proportion, unless given.")
@click.option("--batch", type=int)
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--weight-decay", type=float)
@click.option("--momentum", type=float)
@click.option("--nesterov/--no-nesterov", default=None)
@click.option("--schedule", type=click.Choice(["step", "one-cycle"]))
@click.option("--milestones", callback=_milestones, help="Epochs of the x0.1 steps, e.g. 200,400.")
@click.option("--warmup", type=float, help="one-cycle: share of the run in which the rate rises.")
@click.option("--k", type=int, help="MACER, SmoothAdv: noisy copies an image.")
@click.option("--lam", type=float, help="MACER: weight of the robustness loss.")
@click.option("--gamma", type=float, help="MACER: hinge.")
@click.option("--beta", type=float, help="MACER: inverse temperature.")
@click.option("--defer", type=int, help="MACER: epochs before the robustness loss sets in.")
@click.option("--attack", type=click.Choice(["pgd", "ddn"]), help="SmoothAdv: the attack.")
@click.option("--epsilon", type=float, help="SmoothAdv: its L2 norm at most, pixel values in [0, 1].")
@click.option("--attack-steps", type=int, help="SmoothAdv: its steps.")
@click.option("--ramp", type=int, help="SmoothAdv: epochs in which epsilon rises to its value.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--size", type=int, default=None, help="imagenet, folder: side of the training crops and inputs.  [224]")
@click.option("--limit", type=int, default=None, help="Train on this many images only.")
@click.option(
    "--workers", "loader_workers", type=int, default=2, show_default=True, help="imagenet, folder: decoding processes."
)
@click.option("--device", default=None, help="cpu or cuda.  [default: cuda where there is one]")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@click.option("--compile", "compile_", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: all cores]")
@click.option("--restart", is_flag=True, help="Discard an interrupted run of the same --out.")
def command(**options: Any) -> None:
    """Train a base classifier for smoothing and write it as a checkpoint.

    Without further options this is the published recipe of the method. An interrupted run (Ctrl-C, SIGTERM,
    power cut) is continued by the same command, bit for bit.
    """
    from tqdm import tqdm

    from training.session import TrainingOptions, run_training

    bar: tqdm[Any] | None = None

    def progress(epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=chosen.epochs * steps, initial=epoch * steps + step - 1, unit="step", file=sys.stderr)
        bar.update(1)
        shown = {"loss": metrics.get("loss"), "radius": metrics.get("soft_radius"), "correct": metrics.get("correct")}
        if step == 1 or step == steps:
            bar.set_description(f"epoch {epoch + 1}/{chosen.epochs}", refresh=False)
            bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items() if v is not None}, refresh=False)

    recipe_options = {
        name: options.pop(name)
        for name in (
            [
                "epochs",
                "batch",
                "lr",
                "weight_decay",
                "momentum",
                "nesterov",
                "schedule",
                "milestones",
                "warmup",
                "k",
                "lam",
                "gamma",
                "beta",
                "defer",
                "attack",
                "epsilon",
                "attack_steps",
                "ramp",
            ]
        )
    }
    settings = TrainingOptions(**options)
    chosen = settings.recipe(recipe_options)
    click.echo(f"{settings.dataset}, {chosen.to_json()}", err=True)
    try:
        config = run_training(settings, chosen, progress=progress)
    finally:
        if bar is not None:
            bar.close()
    click.echo(f"wrote {settings.out}  {config.digest}")
