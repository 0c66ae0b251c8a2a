"""`macer train`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from macer_serve.cli.data_options import data_options
from macer_serve.cli.exit_codes import STOPPED
from macer_serve.cli.options import Command, with_options
from macer_serve.cli.recipe_choice import DEFAULT_METHOD, DEFAULT_SIGMA, Choice, RecipeName, choose
from macer_serve.datasets import Split, require_present
from macer_serve.errors import DataError, InterruptedRunError
from macer_serve.training.methods import METHODS
from macer_serve.training.options import WITHOUT_HELD_OUT, Callbacks, TrainingOptions
from macer_serve.training.recipe_file import named_recipes
from macer_serve.training.recipes import NAMES, OPTIONS

if TYPE_CHECKING:
    from tqdm import tqdm

    from macer_serve.evaluation.logs import Row
    from macer_serve.training.recipe import Recipe


def _milestones(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(",") if part)
    except ValueError:
        raise click.BadParameter("expected epochs separated by commas, such as 50,100") from None


def _seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter("expected whole numbers separated by commas, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise click.BadParameter("a seed is named twice")
    return seeds


def method_options(command: Command) -> Command:
    """Adds an option for each constant that some method has, as the table of methods describes it."""
    constants: dict[str, list[tuple[str, Any]]] = {}
    for name, method in METHODS.items():
        for constant, described in method.constants().items():
            constants.setdefault(constant, []).append((name, described))
    options = []
    for constant, uses in constants.items():
        _, described = uses[0]
        choices = described.metadata["choices"]
        meanings: dict[str, list[str]] = {}
        for name, use in uses:
            meanings.setdefault(use.metadata["help"], []).append(name)
        said = "; ".join(f"{', '.join(names)}: {meaning}" for meaning, names in meanings.items())
        kind = click.Choice(choices) if choices else type(described.default)
        options.append(click.option(f"--{constant.replace('_', '-')}", type=kind, help=f"{said}."))
    return with_options(tuple(options))(command)


@click.command("train")
@data_options(dataset_default="that of the recipe file")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The checkpoint folder to write.  [default: runs/DATASET-METHOD-sigmaSIGMA, or runs/ and the file's name]",
)
@click.option("--method", type=click.Choice(list(METHODS)), help=f"[default: {DEFAULT_METHOD}]")
@click.option(
    "--arch",
    default=None,
    help="Base classifier, or torchvision:NAME.  [default: resnet110, lenet or resnet50, by data set]",
)
@click.option("--sigma", type=float, help=f"Noise, in pixel values in [0, 1].  [default: {DEFAULT_SIGMA}]")
@click.option(
    "--recipe",
    "recipe_name",
    type=RecipeName(),
    default="published",
    show_default=True,
    help=f"The constants to start from, which the options below replace: {', '.join((*NAMES, *named_recipes()))}, or a "
    "file that also says the data set, the noise and the phases.",
)
@click.option("--print-recipe", is_flag=True, help="Print the recipe as a file and end, for example to change a copy.")
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
@click.option("--ema", type=float, help="Decay per step of the average of the weights that is exported; 0 for none.")
@method_options
@click.option("--seed", type=int, help="[default: 0]")
@click.option(
    "--seeds", callback=_seeds, help="Train once for each, e.g. 0,1,2: the checkpoints are OUT/seed-0, OUT/seed-1, ..."
)
@click.option("--size", type=int, default=None, help="imagenet, folder: side of the training crops and inputs.  [224]")
@click.option("--limit", type=int, default=None, help="Train on this many images only.")
@click.option(
    "--workers", type=int, default=1, show_default=True, help="Train on this many GPUs or CPUs, by Ray Train."
)
@click.option(
    "--loaders",
    type=int,
    help="imagenet, folder: decoding processes.  [default: all cores for a GPU, 2 for a CPU]",
)
@click.option("--packed", type=click.Path(path_type=Path), help="Read training images from this pack (macer pack).")
@click.option("--micro-batch", type=int, help="Images per pass, if a batch with its copies does not fit in memory.")
@click.option("--save-every", type=int, help="Save every N steps, too, not only after each epoch.")
@click.option("--keep", type=int, default=2, show_default=True, help="Saved states to keep.")
@click.option("--held-out", type=int, default=100, show_default=True, help="Test images certified at the end.")
@click.option("--certify-every", type=int, help="Certify them every N epochs, too.")
@click.option("--tensorboard/--no-tensorboard", default=True, show_default=True, help="Curves in OUT.run/tensorboard.")
@click.option("--device", default=None, help="cpu or cuda.  [default: cuda where there is one]")
@click.option("--precision", type=click.Choice(["auto", "bf16", "tf32", "fp32"]), default="auto", show_default=True)
@click.option("--compile", "compile_", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option(
    "--deterministic", is_flag=True, help="GPUs: only kernels whose results repeat bit for bit. (CPUs: they all do.)"
)
@click.option("--cudnn-benchmark", is_flag=True, help="GPUs: let cuDNN choose its kernels by timing.")
@click.option("--cuda-graphs", is_flag=True, help="GPUs: replay the compiled network as one graph.")
@click.option("--sync-batch-norm", is_flag=True, help="GPUs: batch normalisation over all workers.")
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: all cores]")
@click.option("--restart", is_flag=True, help="Discard an interrupted run of the same --out.")
def command(**options: Any) -> None:
    """Train a base classifier for smoothing and write it as a checkpoint.

    Without further options this is the published recipe of the method. The same command continues a run that was
    interrupted (Ctrl-C, SIGTERM, power cut): on CPUs bit for bit, on GPUs so with --deterministic.
    """
    given = {option: value for option in OPTIONS if (value := options.pop(option)) is not None}
    choice = choose(options.pop("recipe_name"), options, given)
    if options.pop("print_recipe"):
        click.echo(choice.text, nl=False)
        return
    out, seed, seeds = (options.pop(name) for name in ("out", "seed", "seeds"))
    if seeds and seed is not None:
        raise click.UsageError("give one seed (--seed) or several (--seeds)")
    out = out or choice.out
    first = choice.phases[0]
    settings = TrainingOptions(
        out=out,
        dataset=choice.dataset,
        method=first.method,
        sigma=first.sigma,
        arch=choice.arch,
        init=choice.init,
        seed=seed or 0,
        recipe_file=choice.text,
        **options,
    )
    runs = [replace(settings, out=out / f"seed-{one}", seed=one) for one in seeds] or [settings]
    _require_data(choice.dataset, options)
    for run in runs:
        _train(run, choice, given)


def _train(settings: TrainingOptions, choice: Choice, given: dict[str, Any]) -> None:
    """Trains all phases with one seed. Ends the command if the run is told to stop."""
    from macer_serve.training.phases import run_phases

    def begin(number: int, recipe: Recipe) -> None:
        title = choice.title + (f", phase {number} of {len(choice.phases)}" if len(choice.phases) > 1 else "")
        bars.begin(recipe.epochs)
        click.echo(_table(settings.dataset, title, settings.seed, recipe, given), err=True)

    try:
        with _Bars(settings.held_out) as bars:
            callbacks = Callbacks(
                phase=begin, progress=bars.step, certified=bars.certified, checked=bars.checked, note=_note
            )
            config = run_phases(settings, choice.phases, callbacks)
    except InterruptedRunError as error:
        click.echo(f"macer: {error}", err=True)
        sys.exit(STOPPED)
    if held_out := config.metrics.get("held_out"):
        click.echo(_curve(held_out), err=True)
    click.echo(f"wrote {settings.out}  {config.digest}")


def _require_data(dataset: str, options: dict[str, Any]) -> None:
    """Looks for the data before torch is loaded, which takes seconds."""
    splits: tuple[Split, ...] = ("train", "test") if options["held_out"] else ("train",)
    for split in splits:
        if split == "train" and options["packed"] is not None:
            continue
        where = (dataset, options["data_dir"], split)
        try:
            require_present(*where, download=options["download"], share=options["split"])
        except DataError as error:
            words = f"{error} {WITHOUT_HELD_OUT}" if split == "test" else str(error)
            settings = (*error.settings, "held_out") if split == "test" else error.settings
            raise DataError(words, settings=settings) from error


def _table(dataset: str, name: str, seed: int, chosen: Recipe, given: dict[str, Any]) -> str:
    """Returns the recipe as a table, one constant per line; those that the user gave are marked."""
    rows = {"data set": dataset, "recipe": name, "seed": seed, **chosen.to_json()}
    width = max(map(len, rows))
    return "\n".join(
        f"{row:{width}}  {_shown(value)}{'  (given)' if row in given else ''}" for row, value in rows.items()
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _note(text: str) -> None:
    click.echo(text, err=True)


class _Bars:
    """Progress bars on stderr: files checked, then steps with the metrics of the last epoch, then held-out images."""

    def __init__(self, held_out: int) -> None:
        self.epochs, self.held_out = 0, held_out
        self.steps: tqdm[Any] | None = None
        self.images: tqdm[Any] | None = None
        self.files: tqdm[Any] | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *raised: object) -> None:
        self._close()

    def begin(self, epochs: int) -> None:
        """Begins a phase of so many epochs, with bars of its own."""
        self._close()
        self.epochs = epochs

    def _close(self) -> None:
        for bar in (self.files, self.images, self.steps):
            if bar is not None:
                bar.close()
        self.files = self.images = self.steps = None

    def checked(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.files is None:
            self.files = tqdm(total=total, unit="file", desc="checking images", file=sys.stderr, leave=False, delay=1)
        self.files.update(done - self.files.n)
        if done == total:
            self.files.close()

    def step(self, epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        from tqdm import tqdm

        if self.steps is None:
            total, done = self.epochs * steps, epoch * steps + step - 1
            self.steps = tqdm(total=total, initial=done, unit="step", file=sys.stderr)
        names = {"loss": "loss", "soft_radius": "radius", "noisy_correct": "right under noise"}
        shown = {label: f"{metrics[name]:.3f}" for name, label in names.items() if name in metrics}
        self.steps.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        self.steps.set_postfix(shown, refresh=False)
        self.steps.update(epoch * steps + step - self.steps.n)  # many workers do not report every step

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
