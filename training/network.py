"""The base classifier as methods call it, on one worker or on many."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.precision import Precision


@dataclass(frozen=True, slots=True)
class Group:
    """This worker's place among those that share every batch."""

    rank: int = 0
    size: int = 1

    def total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over all workers on the first of them, nothing on the others: so none is counted twice later."""
        if self.size == 1 or not sums:
            return sums
        flat = torch.stack(list(sums.values()))
        dist.all_reduce(flat)
        return dict(zip(sums, flat, strict=True)) if self.rank == 0 else {}

    def agreed(self, value: Tensor) -> Tensor:
        """The mean over all workers of a value that each has."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value


class Network:
    """A model made channels-last, autocast and compiled once at static shapes; its gradients averaged over workers."""

    def __init__(self, model: nn.Module, precision: Precision, group: Group) -> None:
        self.model, self.precision = model, precision
        model.to(precision.device).to(memory_format=torch.channels_last)
        # Static shapes: with dynamic ones the graphs of a short last batch differ after a restart, and so do bits.
        alone = cast(nn.Module, torch.compile(model, dynamic=False)) if precision.compiled else model
        self._alone, self._together = alone, alone if group.size == 1 else DistributedDataParallel(alone)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits `[k, classes]` of `x` `[k, C, H, W]` in [0, 1], for the update."""
        return self._logits(self._together, x)

    def frozen(self, x: Tensor) -> Tensor:
        """Logits in evaluation mode, the weights constants: what an attack differentiates. Each call undoes itself."""
        self.model.eval().requires_grad_(False)
        try:
            return self._logits(self._alone, x)
        finally:
            self.model.train().requires_grad_(True)

    def keeping_gradients(self) -> AbstractContextManager[None]:
        """Gradients made within are added up here, and averaged over the workers with the next ones made without."""
        if isinstance(self._together, DistributedDataParallel):
            return self._together.no_sync()
        return nullcontext()

    def _logits(self, forward: nn.Module, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.precision.device.type, torch.bfloat16, enabled=self.precision.bf16):
            return forward(x)  # type: ignore[no-any-return]
