"""The base classifier as training methods call it, on one worker or on many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from macer_serve.dry_run import output_shape
from macer_serve.errors import TrainingError
from macer_serve.training.precision import Precision


@dataclass(frozen=True, slots=True)
class Group:
    """The workers that share every batch: this worker's rank, and their number."""

    rank: int = 0
    size: int = 1

    def total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the sums over all workers on rank 0 and nothing on the others, so that none is counted twice."""
        if self.size == 1 or not sums:
            return sums
        flat = torch.stack(list(sums.values()))
        dist.all_reduce(flat)
        return dict(zip(sums, flat, strict=True)) if self.rank == 0 else {}

    def agreed(self, value: Tensor) -> Tensor:
        """Returns the mean over all workers of a value that each has."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def require_alike(self, settings: dict[str, Any]) -> None:
        """Raises `TrainingError` on all workers unless their settings are the same."""
        if self.size == 1:
            return
        all_settings: list[Any] = [None] * self.size
        dist.all_gather_object(all_settings, settings)
        for rank, others in enumerate(all_settings):
            if differing := [name for name, value in others.items() if value != all_settings[0][name]]:
                what = "; ".join(f"{name} is {all_settings[0][name]!r} and {others[name]!r}" for name in differing)
                raise TrainingError(
                    f"workers 0 and {rank} differ: {what}. All workers need machines of one kind, the same files in "
                    "the data folder, and the same output folder.",
                    settings=("data_dir", "out"),
                )

    def wait(self) -> None:
        """Returns when all workers have called it."""
        if self.size > 1:
            dist.barrier()


class Agreement:
    """Tells every worker whether any worker raised the flag at the step before.

    The hosts exchange the answers during a step, so that neither they nor their devices wait.
    """

    def __init__(self) -> None:
        self._hosts = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._said = torch.zeros((), dtype=torch.int32)
        self._exchange: dist.Work | None = None

    def __call__(self, yes: bool) -> bool:
        """Returns whether any worker said yes at the call before."""
        if self._exchange is not None:
            self._exchange.wait()
        agreed = bool(self._said)
        self._said = torch.tensor(int(yes), dtype=torch.int32)
        self._exchange = dist.all_reduce(self._said, group=self._hosts, async_op=True)
        return agreed


class Network:
    """A model with channels-last tensors and autocast, compiled at static shapes; the same on all workers."""

    def __init__(self, model: nn.Module, precision: Precision, group: Group) -> None:
        self.model, self.precision, self.group = model, precision, group
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._refused: dict[tuple[int, ...], bool] = {}
        self._exchanged: _Exchanged | None = None
        model.to(precision.device).to(memory_format=torch.channels_last)
        # With dynamic shapes, a short last batch may have another graph, and other bits, after a restart.
        mode = "reduce-overhead" if precision.gpu.cuda_graphs else None
        self._forward = cast(nn.Module, torch.compile(model, dynamic=False, mode=mode)) if precision.compiled else model
        if group.size > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the logits `[k, classes]` of `x` `[k, C, H, W]` in [0, 1], for the update.

        A single copy has no batch statistics if a feature map is of one pixel. Batch normalisation then uses its
        running statistics, and leaves them as they are.
        """
        if self.precision.gpu.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        x = x.contiguous(memory_format=torch.channels_last)
        alone = len(x) == 1 and self.model.training and self._needs_two(tuple(x.shape))
        statistics = _running_statistics(self.norms) if alone else nullcontext()
        with statistics, torch.autocast(self.precision.device.type, torch.bfloat16, enabled=self.precision.bf16):
            return self._forward(x)  # type: ignore[no-any-return]

    def _needs_two(self, shape: tuple[int, ...]) -> bool:
        """Returns whether batch normalisation in training mode refuses a batch of one copy. The result is kept."""
        if shape not in self._refused:
            try:
                if self.norms:
                    output_shape(self.model, shape)
                self._refused[shape] = False
            except ValueError:  # expected more than 1 value per channel when training
                self._refused[shape] = True
        return self._refused[shape]

    @contextmanager
    def frozen(self) -> Iterator[Network]:
        """Yields the network in evaluation mode with constant weights, for as long as the context lasts.

        Attacks differentiate it. It takes a walk over all modules and weights, which an attack pays once, not at each
        of its steps.
        """
        self.model.eval().requires_grad_(False)
        try:
            yield self
        finally:
            self.model.train().requires_grad_(True)

    def exchange(self, share: float) -> None:
        """Adds up the gradients of all workers, and averages their batch-norm statistics by their shares of the batch.

        All values are added in one piece and always in the same order, so that a continued run has the same bits.
        (`DistributedDataParallel` rearranges its buckets after the first step, and in evaluation mode does not
        exchange statistics.)
        """
        if self.group.size == 1:
            return
        if self._exchanged is None:
            statistics = [s for norm in self.norms for s in (norm.running_mean, norm.running_var) if s is not None]
            self._exchanged = _Exchanged([p for p in self.model.parameters() if p.grad is not None], statistics)
        self._exchanged.run(share)


class _Exchanged:
    """What workers exchange at each step, in one flat buffer that lasts as long as the run.

    Every gradient and every statistic has a view of it, laid out as the tensor itself. The optimiser reads the
    gradients there, so that they are not copied back.
    """

    def __init__(self, weights: list[nn.Parameter], statistics: list[Tensor]) -> None:
        self.weights, self.statistics = weights, statistics
        own = [*weights, *statistics]
        self.flat = torch.zeros(sum(value.numel() for value in own), device=own[0].device, dtype=own[0].dtype)
        parts = torch.split(self.flat, [value.numel() for value in own])
        views = [part.as_strided(value.shape, value.stride()) for part, value in zip(parts, own, strict=True)]
        self.gradients, self.means = views[: len(weights)], views[len(weights) :]

    def run(self, share: float) -> None:
        """Adds up the gradients and averages the statistics, weighted by `share`, over all workers."""
        torch._foreach_copy_(self.gradients, [cast(Tensor, weight.grad) for weight in self.weights])
        if self.means:
            torch._foreach_copy_(self.means, self.statistics)
            torch._foreach_mul_(self.means, share)
        dist.all_reduce(self.flat)
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        if self.means:
            torch._foreach_copy_(self.statistics, self.means)


@contextmanager
def _running_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Lets batch normalisation use its running statistics for as long as the context lasts."""
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
