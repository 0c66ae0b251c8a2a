"""The training loop: it knows batches, steps and saving, and nothing of methods.

Every random number is addressed by (seed, epoch, step), so a run's state is its weights, its optimiser and
where it stands; a run that was stopped anywhere continues to the very weights it would have reached.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from macer_serve.errors import TrainingError
from macer_serve.hardware import has_amx, multiplies_bf16, pick_device
from training.data import Batches, generator_for
from training.methods import METHOD_FUNCTIONS, Logits, Step
from training.recipes import Recipe
from training.run_state import RunFolder

log = logging.getLogger(__name__)

Progress = Callable[[int, int, int, dict[str, float]], None]


class InterruptedRunError(TrainingError):
    """The run was asked to stop, and its state is saved."""

    exit_code = 143
    title = "Training interrupted"


@dataclass(frozen=True, slots=True)
class Precision:
    """How the network is computed; fixed for a run, since each choice gives other bits."""

    device: torch.device
    bf16: bool
    compiled: bool
    threads: int

    @classmethod
    def choose(cls, device: str | None, precision: str, compile_: str) -> Precision:
        """What pays on this machine, unless told: bf16 where the hardware multiplies it, compiled on GPUs and AMX."""
        chosen = pick_device(device)
        compiler = _compiler(chosen)
        if compile_ == "on" and compiler is None:
            raise TrainingError("--compile on needs a C++ compiler (g++, or the one CXX names); use --compile off")
        return cls(
            chosen,
            multiplies_bf16(chosen) if precision == "auto" else precision == "bf16",
            compile_ == "on" or (compile_ == "auto" and compiler is not None and (chosen.type == "cuda" or has_amx())),
            torch.get_num_threads(),
        )

    def to_json(self) -> dict[str, Any]:
        cpu = {"threads": self.threads} if self.device.type == "cpu" else {}
        return {"device": self.device.type, "bf16": self.bf16, "compiled": self.compiled, **cpu}


def _compiler(device: torch.device) -> str | None:
    """The compiler that torch.compile would call, None where there is none: it fails at the first step then."""
    if device.type == "cuda":  # Triton builds its launchers with a C compiler
        names = [os.environ["CC"]] if "CC" in os.environ else ["clang", "gcc"]
    else:
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
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


def _network(model: nn.Module, precision: Precision) -> Logits:
    """The model as the methods call it: channels-last, autocast, compiled once at static shapes."""
    model.to(precision.device).to(memory_format=torch.channels_last)
    # Static shapes: with dynamic ones the graphs of a short last batch differ after a restart, and so do bits.
    forward = torch.compile(model, dynamic=False) if precision.compiled else model

    def logits(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(precision.device.type, torch.bfloat16, enabled=precision.bf16):
            return forward(x)  # type: ignore[no-any-return]

    return logits


def _frozen(model: nn.Module, network: Logits) -> Logits:
    """The network in evaluation mode and without gradients of its weights, each call leaving it as it was."""

    def logits(x: Tensor) -> Tensor:
        model.eval().requires_grad_(False)
        try:
            return network(x)
        finally:
            model.train().requires_grad_(True)

    return logits


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    seed: int,
    precision: Precision,
    run: RunFolder,
    identity: dict[str, Any],
    progress: Progress = lambda epoch, step, steps, metrics: None,
) -> list[dict[str, Any]]:
    """Train `model` in place, from the saved state where there is one; the log's entries, one an epoch.

    `identity` is everything a continued run must share with the saved one. Raises `InterruptedRunError` after
    SIGTERM or SIGINT, state saved; `TrainingError` where the loss is no longer finite.
    """
    network, method = _network(model, precision), METHOD_FUNCTIONS[recipe.method]
    frozen = _frozen(model, network)
    optimizer = torch.optim.SGD(
        model.parameters(),
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )
    first_epoch, first_step, sums, seconds = 0, 0, dict[str, Tensor](), 0.0
    if (state := run.load(identity)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch, first_step, seconds = state["epoch"], state["step"], state["seconds"]
        sums = {name: value.to(precision.device) for name, value in state["sums"].items()}
        log.info("continuing at epoch %d, step %d", first_epoch + 1, first_step)

    def save(epoch: int, step: int, seconds: float) -> None:
        where = {"epoch": epoch, "step": step, "seconds": seconds, "sums": sums}
        run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **where}, identity)

    with _stop_requests() as stop_requested:
        metrics: dict[str, float] = next((e for e in reversed(run.entries())), {})
        for epoch in range(first_epoch, recipe.epochs):
            model.train()
            started = time.monotonic() - seconds
            step = first_step
            for images, labels in batches.epoch(epoch, first_step):
                rate = recipe.learning_rate(epoch * batches.steps_per_epoch + step, batches.steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                noise = generator_for(precision.device, seed, "noise", epoch, step)
                loss, parts = method(network, images, labels, recipe, Step(epoch, noise, frozen))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                for name, value in parts.items():
                    value = value.detach().double()
                    sums[name] = sums[name] + value if name in sums else value
                step += 1
                progress(epoch, step, batches.steps_per_epoch, metrics)
                if stop_requested() and step < batches.steps_per_epoch:
                    _require_finite(epoch, sums, model, run)
                    save(epoch, step, time.monotonic() - started)
                    raise InterruptedRunError(
                        f"stopped at epoch {epoch + 1}, step {step}; the state is saved. "
                        "Run the same command again to continue."
                    )
            seconds = time.monotonic() - started
            metrics = _metrics(sums, batches.images_per_epoch, seconds)
            _require_finite(epoch, sums, model, run)
            run.log({"epoch": epoch, "lr": rate, **metrics})
            sums, seconds, first_step = {}, 0.0, 0
            save(epoch + 1, 0, 0.0)
            if stop_requested() and epoch + 1 < recipe.epochs:
                raise InterruptedRunError(f"stopped after epoch {epoch + 1}; run the same command again to continue.")
    return run.entries()


def _require_finite(epoch: int, sums: dict[str, Tensor], model: nn.Module, run: RunFolder) -> None:
    """Raise `TrainingError` before a state is saved that no further step could mend."""
    # The weights too: the last step's loss is from before its update.
    weights = torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all()
    loss = float(sums["loss"])
    if not (math.isfinite(loss) and weights):
        what = f"the loss became {loss}" if not math.isfinite(loss) else "the weights became infinite"
        raise TrainingError(
            f"{what} in epoch {epoch + 1}. Start anew (--restart) with a lower --lr, a longer --defer (MACER) "
            f"or --precision fp32; the last finite state is kept in {run.folder}."
        )


def _metrics(sums: dict[str, Tensor], images: int, seconds: float) -> dict[str, float]:
    """Sums over an epoch as means an image, with the one host synchronisation of the epoch."""
    means = {name: float(value) / images for name, value in sums.items()}
    return {**means, "seconds": round(seconds, 3), "images_per_second": round(images / max(seconds, 1e-9), 1)}
