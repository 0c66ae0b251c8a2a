"""The training loop. It handles batches, steps and saving, and does not depend on the method.

Every random number is addressed by (seed, epoch, step, rank). The state of a run is its weights, its optimiser and its
place, so that a run that was stopped anywhere continues to the very weights it would have reached.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from macer_serve.errors import InterruptedRunError, TrainingError
from macer_serve.training.data import Batches, generator_for
from macer_serve.training.method import Step
from macer_serve.training.methods import METHODS
from macer_serve.training.network import Group, Network
from macer_serve.training.options import Progress
from macer_serve.training.precision import Precision
from macer_serve.training.recipe import Recipe
from macer_serve.training.run_state import RunFolder

log = logging.getLogger(__name__)

# Steps after which a large loss counts as divergence: the first ones, from random weights, may overshoot.
_SETTLED = 100
AfterEpoch = Callable[[int, nn.Module], None]


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """The options of the loop, beside the recipe.

    `micro_batch` images at a time pass through the network, and their gradients are added up; None for the whole batch.
    The state is saved after each epoch, and every `save_every` steps. An epoch whose mean loss exceeds `most_loss`
    counts as divergence, except during the first steps. `stop_requested` is asked at every step and must answer all
    workers alike; None for SIGTERM and SIGINT. `progress` is called at every step. `after_epoch` is called with the
    number of finished epochs and the model to be exported, when their state is saved. It may be called twice for one
    epoch after a restart, and must skip finished work.
    """

    precision: Precision
    micro_batch: int | None = None
    save_every: int | None = None
    most_loss: float = math.inf
    group: Group = field(default_factory=Group)
    stop_requested: Callable[[], bool] | None = None
    progress: Progress = lambda epoch, step, steps, metrics: None
    after_epoch: AfterEpoch = lambda epochs, model: None


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM or SIGINT has arrived since the context began."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Run:
    """The parts of a run that change, and their state on disk."""

    def __init__(self, model: nn.Module, recipe: Recipe, options: LoopOptions, folder: RunFolder, seed: int) -> None:
        self.model, self.recipe, self.options, self.folder, self.seed = model, recipe, options, folder, seed
        self.network = Network(model, options.precision, options.group)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
            fused=True,
        )
        self.average = copy.deepcopy(model) if recipe.ema else None
        self._averaged = None if self.average is None else _state_pairs(self.average, model)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.sums: dict[str, Tensor] = {}

    @property
    def exported(self) -> nn.Module:
        """The model that would be exported now."""
        return self.model if self.average is None else self.average

    def load(self, identity: dict[str, Any], images: int) -> None:
        """Takes up the saved state, if there is one."""
        state = self.folder.load(identity)
        where = None if state is None else (state["epoch"], state["step"])
        self.options.group.require_alike({**identity, "images": images, "saved state": where})
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        if self.options.group.rank == 0:  # the totals over all workers
            self.sums = {name: value.to(self.options.precision.device) for name, value in state["sums"].items()}
        log.info("continuing at epoch %d, step %d", self.epoch + 1, self.step)

    def save(self, seconds: float, identity: dict[str, Any]) -> None:
        """Saves the state, `seconds` into its epoch. All workers wait until it is saved."""
        self.sums = self.options.group.total(self.sums)
        if self.options.group.rank == 0:
            where = {"epoch": self.epoch, "step": self.step, "seconds": seconds, "sums": self.sums}
            average = {} if self.average is None else {"average": self.average.state_dict()}
            weights = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.folder.save({**weights, **average, **where}, identity)
        self.options.group.wait()

    def update(self, images: Tensor, labels: Tensor, share: float, rate: float) -> None:
        """Takes one optimiser step on this worker's `share` of a batch."""
        options, recipe = self.options, self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        address = (self.seed, "noise", self.epoch, self.step, options.group.rank)
        noise = generator_for(options.precision.device, *address)
        _seed_layers(options.precision.device, generator_for("cpu", "layers", *address).initial_seed())
        self.optimizer.zero_grad(set_to_none=True)
        size = options.micro_batch or len(images)
        parts = list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
        for part, its_labels in parts:
            step = Step(self.epoch, noise, self.network.frozen)
            loss, sums = METHODS[recipe.method].loss(self.network, part, its_labels, recipe, step)
            # Each loss is a mean over its part. The weighted losses add up to the mean over the whole batch.
            weight = len(part) / len(images) * share
            (loss if weight == 1.0 else loss * weight).backward()  # type: ignore[no-untyped-call]
            for name, value in sums.items():
                value = value.detach().double() * bool(share)
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.network.exchange(share)
        self.optimizer.step()
        self._update_average()
        self.step += 1

    def _update_average(self) -> None:
        """Moves the average towards this step's weights. It begins at the weights of the first step.

        torch's `AveragedModel` keeps its count of steps in a tensor, and reading that would wait for the device.
        """
        if self._averaged is None:
            return
        towards = 1.0 - self.recipe.ema if self.epoch or self.step else 1.0
        (kept, new), (kept_counts, new_counts) = self._averaged
        with torch.no_grad():
            torch._foreach_lerp_(kept, new, towards)
            if kept_counts:
                torch._foreach_copy_(kept_counts, new_counts)

    def require_finite(self) -> None:
        """Raises `TrainingError` if the loss or a weight is not finite, so that no such state is saved."""
        # The loss of the last step does not see the weights after its update.
        weights = torch.stack([value.isfinite().all() for value in self.model.state_dict().values()]).all()
        agreed = self.options.group.agreed(torch.stack([self.sums["loss"], weights.to(self.sums["loss"])])).tolist()
        if not (math.isfinite(agreed[0]) and agreed[1] == 1.0):
            what = "the weights became infinite" if math.isfinite(agreed[0]) else f"the loss became {agreed[0]}"
            raise _diverged(what, self.epoch, self.folder)


def _state_pairs(kept: nn.Module, new: nn.Module) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Returns the tensors of both modules' states: those of floating point, then the others, which are counts.

    They are looked up once for a run: a state of a hundred layers takes longer to look up than to average. Loading a
    state writes into these very tensors.
    """
    states = kept.state_dict(keep_vars=True), new.state_dict(keep_vars=True)
    means = [name for name, value in states[0].items() if value.is_floating_point()]
    counts = [name for name, value in states[0].items() if not value.is_floating_point()]
    return [([states[0][name] for name in part], [states[1][name] for name in part]) for part in (means, counts)]


def _seed_layers(device: torch.device, seed: int) -> None:
    """Seeds torch's own generator of the device, from which layers such as dropout draw."""
    # `torch.manual_seed` would record the whole call stack each time while CUDA is not in use.
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _diverged(what: str, epoch: int, folder: RunFolder) -> TrainingError:
    states = folder.states()
    kept = f"the last finite state is kept: {states[-1]}" if states else "no state was saved before"
    return TrainingError(
        f"{what} in epoch {epoch + 1}. Start anew with a lower learning rate, a longer deferral (MACER), or in fp32; "
        f"{kept}.",
        settings=("restart", "lr", "defer", "precision"),
    )


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    seed: int,
    options: LoopOptions,
    folder: RunFolder,
    identity: dict[str, Any],
) -> nn.Module:
    """Trains `model` in place, from the saved state if there is one. Returns the model to be exported.

    `identity` is everything that a continued run must share with the saved one. Raises `InterruptedRunError` after
    SIGTERM or SIGINT, with the state saved, and `TrainingError` if the loss is no longer finite.
    """
    run = _Run(model, recipe, options, folder, seed)
    run.load(identity, batches.images_per_epoch)
    steps, first = batches.steps_per_epoch, options.group.rank == 0
    if first and run.epoch and not run.step:
        options.after_epoch(run.epoch, run.exported)
    with nullcontext(options.stop_requested) if options.stop_requested else stop_requests() as stop_requested:
        metrics: dict[str, float] = next((e for e in reversed(folder.entries())), {})
        while run.epoch < recipe.epochs:
            model.train()
            started = time.monotonic() - run.seconds
            if run.step >= steps:  # images were removed while the run was interrupted
                run.step = steps - 1
            for images, labels, share in batches.epoch(run.epoch, run.step):
                rate = recipe.learning_rate(run.epoch * steps + run.step, steps)
                run.update(images, labels, share, rate)
                options.progress(run.epoch, run.step, steps, metrics)
                stop = stop_requested()
                due = options.save_every is not None and run.step % options.save_every == 0
                if (stop or due) and run.step < steps:
                    run.require_finite()
                    run.save(time.monotonic() - started, identity)
                    if stop:
                        raise InterruptedRunError(
                            f"stopped at epoch {run.epoch + 1}, step {run.step}; the state is saved. "
                            "Run the same command again to continue."
                        )
            seconds = time.monotonic() - started
            run.require_finite()
            sums = options.group.total(run.sums)
            if first:
                metrics = _metrics(sums, batches.images_per_epoch, seconds)
                settled = (run.epoch + 1) * steps >= _SETTLED or run.epoch + 1 == recipe.epochs
                if settled and metrics["loss"] > options.most_loss:
                    raise _diverged(f"the loss rose to {metrics['loss']:.3g}", run.epoch, folder)
                folder.log({"epoch": run.epoch, "lr": rate, "images": batches.images_per_epoch, **metrics})
            run.sums, run.seconds, run.step, run.epoch = {}, 0.0, 0, run.epoch + 1
            run.save(0.0, identity)
            if first:
                options.after_epoch(run.epoch, run.exported)
            if stop_requested() and run.epoch < recipe.epochs:
                raise InterruptedRunError(f"stopped after epoch {run.epoch}; run the same command again to continue.")
    return run.exported


def _metrics(sums: dict[str, Tensor], images: int, seconds: float) -> dict[str, float]:
    """Returns the sums over an epoch as means per image. This is the epoch's one wait for the device."""
    means = {name: float(value) / images for name, value in sums.items()}
    return {**means, "seconds": round(seconds, 3), "images_per_second": round(images / max(seconds, 1e-9), 1)}
