"""The training loop: it knows batches, steps and saving, and nothing of methods.

Every random number is addressed by (seed, epoch, step, worker), so a run's state is its weights, its optimiser and
where it stands; a run that was stopped anywhere continues to the very weights it would have reached.
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

from macer_serve.errors import TrainingError
from macer_serve.training.data import Batches, generator_for
from macer_serve.training.methods import METHOD_FUNCTIONS, Step
from macer_serve.training.network import Group, Network
from macer_serve.training.precision import Precision
from macer_serve.training.recipes import Recipe
from macer_serve.training.run_state import RunFolder

log = logging.getLogger(__name__)

Progress = Callable[[int, int, int, dict[str, float]], None]
AfterEpoch = Callable[[int, nn.Module], None]


class InterruptedRunError(TrainingError):
    """The run was asked to stop, and its state is saved."""

    exit_code = 143
    title = "Training interrupted"


@dataclass(frozen=True, slots=True)
class Conduct:
    """How a run is carried out, beside its recipe.

    `micro_batch` images at a time go through the network, gradients added up, where a whole batch with its copies
    does not fit in memory; None for the whole batch. The state is saved every `save_every` steps, and after each epoch.
    A mean loss above `most_loss` over an epoch is divergence.
    `stop_requested`, None for SIGTERM and SIGINT, is asked every step, and answers all workers alike.
    `progress` is told every step, and `after_epoch` every epoch when its state is saved, with the number of epochs done
    and the model to be exported; told of an epoch again, when a run continues, it does what it did not yet do.
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
    """Asks whether SIGTERM or SIGINT has arrived, for as long as the context lasts."""
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
    """The moving parts of a run, and their state on disk."""

    def __init__(self, model: nn.Module, recipe: Recipe, conduct: Conduct, folder: RunFolder, seed: int) -> None:
        self.model, self.recipe, self.conduct, self.folder, self.seed = model, recipe, conduct, folder, seed
        self.network = Network(model, conduct.precision, conduct.group)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
            fused=True,
        )
        self.average = copy.deepcopy(model) if recipe.ema else None
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.sums: dict[str, Tensor] = {}

    @property
    def exported(self) -> nn.Module:
        """The model that a checkpoint would hold now."""
        return self.model if self.average is None else self.average

    def load(self, identity: dict[str, Any]) -> None:
        """Take up the saved state, where there is one."""
        state = self.folder.load(identity)
        where = None if state is None else (state["epoch"], state["step"])
        self.conduct.group.require_alike({**identity, "saved state": where})
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        if self.conduct.group.rank == 0:  # totals over all workers: the first has them
            self.sums = {name: value.to(self.conduct.precision.device) for name, value in state["sums"].items()}
        log.info("continuing at epoch %d, step %d", self.epoch + 1, self.step)

    def save(self, seconds: float, identity: dict[str, Any]) -> None:
        """Save where the run stands; `seconds` into its epoch. No worker goes on, or ends, before it is saved."""
        self.sums = self.conduct.group.total(self.sums)
        if self.conduct.group.rank == 0:
            where = {"epoch": self.epoch, "step": self.step, "seconds": seconds, "sums": self.sums}
            average = {} if self.average is None else {"average": self.average.state_dict()}
            weights = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.folder.save({**weights, **average, **where}, identity)
        self.conduct.group.wait()

    def update(self, images: Tensor, labels: Tensor, share: float, rate: float) -> None:
        """One optimiser step on this worker's `share` of a batch."""
        conduct, recipe = self.conduct, self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        address = (self.seed, "noise", self.epoch, self.step, conduct.group.rank)
        noise = generator_for(conduct.precision.device, *address)
        _seed_layers(conduct.precision.device, generator_for("cpu", "layers", *address).initial_seed())
        self.optimizer.zero_grad(set_to_none=True)
        size = conduct.micro_batch or len(images)
        parts = list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
        for part, its_labels in parts:
            step = Step(self.epoch, noise, self.network.frozen)
            loss, sums = METHOD_FUNCTIONS[recipe.method](self.network, part, its_labels, recipe, step)
            # Losses are means over what they were given: weighted, they add up to the mean over the whole batch.
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
        """Move the average towards this step's weights; the first step's are where it begins.

        Not by torch's `AveragedModel`, whose count of steps is a tensor: asking for it waits for the device.
        """
        if self.average is None:
            return
        towards = 1.0 - self.recipe.ema if self.epoch or self.step else 1.0
        kept, new = self.average.state_dict(), self.model.state_dict()
        means = [name for name, value in kept.items() if value.is_floating_point()]
        torch._foreach_lerp_([kept[name] for name in means], [new[name] for name in means], towards)
        for name in kept.keys() - set(means):  # counts of batches
            kept[name].copy_(new[name])

    def require_finite(self) -> None:
        """Raise `TrainingError` before a state is saved that no further step could mend."""
        # The weights too: the last step's loss is from before its update.
        weights = torch.stack([value.isfinite().all() for value in self.model.state_dict().values()]).all()
        agreed = self.conduct.group.agreed(torch.stack([self.sums["loss"], weights.to(self.sums["loss"])])).tolist()
        if not (math.isfinite(agreed[0]) and agreed[1] == 1.0):
            what = "the weights became infinite" if math.isfinite(agreed[0]) else f"the loss became {agreed[0]}"
            raise _stopped(what, self.epoch, self.folder)


def _seed_layers(device: torch.device, seed: int) -> None:
    """Seeds what random layers such as dropout draw from: torch's own generator of the device."""
    # Not by `torch.manual_seed`, which writes down the whole call stack each time while CUDA is not in use.
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _stopped(what: str, epoch: int, folder: RunFolder) -> TrainingError:
    return TrainingError(
        f"{what} in epoch {epoch + 1}. Start anew (--restart) with a lower --lr, a longer --defer (MACER) "
        f"or --precision fp32; the last finite state is kept in {folder.folder}."
    )


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    seed: int,
    conduct: Conduct,
    folder: RunFolder,
    identity: dict[str, Any],
) -> nn.Module:
    """Train `model` in place, from the saved state where there is one; the model to be exported.

    `identity` is everything a continued run must share with the saved one. Raises `InterruptedRunError` after
    SIGTERM or SIGINT, state saved; `TrainingError` where the loss is no longer finite.
    """
    run = _Run(model, recipe, conduct, folder, seed)
    run.load(identity)
    steps, first = batches.steps_per_epoch, conduct.group.rank == 0
    if first and run.epoch and not run.step:
        conduct.after_epoch(run.epoch, run.exported)
    with nullcontext(conduct.stop_requested) if conduct.stop_requested else stop_requests() as stop_requested:
        metrics: dict[str, float] = next((e for e in reversed(folder.entries())), {})
        while run.epoch < recipe.epochs:
            model.train()
            started = time.monotonic() - run.seconds
            for images, labels, share in batches.epoch(run.epoch, run.step):
                rate = recipe.learning_rate(run.epoch * steps + run.step, steps)
                run.update(images, labels, share, rate)
                conduct.progress(run.epoch, run.step, steps, metrics)
                stop = stop_requested()
                due = conduct.save_every is not None and run.step % conduct.save_every == 0
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
            sums = conduct.group.total(run.sums)
            if first:
                metrics = _metrics(sums, batches.images_per_epoch, seconds)
                if metrics["loss"] > conduct.most_loss:
                    raise _stopped(f"the loss rose to {metrics['loss']:.3g}", run.epoch, folder)
                folder.log({"epoch": run.epoch, "lr": rate, **metrics})
            run.sums, run.seconds, run.step, run.epoch = {}, 0.0, 0, run.epoch + 1
            run.save(0.0, identity)
            if first:
                conduct.after_epoch(run.epoch, run.exported)
            if stop_requested() and run.epoch < recipe.epochs:
                raise InterruptedRunError(f"stopped after epoch {run.epoch}; run the same command again to continue.")
    return run.exported


def _metrics(sums: dict[str, Tensor], images: int, seconds: float) -> dict[str, float]:
    """Sums over an epoch as means an image, with the one host synchronisation of the epoch."""
    means = {name: float(value) / images for name, value in sums.items()}
    return {**means, "seconds": round(seconds, 3), "images_per_second": round(images / max(seconds, 1e-9), 1)}
