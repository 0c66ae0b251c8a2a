"""Batches of training images. Each is addressed by (seed, epoch, step), so that a restart can make it again.

Arrays are held on the device as uint8 and augmented there, one batch at a time. Trees of image files are decoded by
DataLoader workers. Both give images `[B, C, H, W]` in [0, 1], labels `[B]`, and the share of the whole batch that these
are. Each batch is divided among the workers of a group. Its images and their augmentation do not depend on the number
of workers.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from macer_serve.datasets import ImageSet
from macer_serve.errors import DataError
from macer_serve.training.images import limited
from macer_serve.training.network import Group


def generator_for(device: torch.device | str, *address: int | str) -> torch.Generator:
    """Returns a generator seeded by a digest of its address, so that it has no state to be saved."""
    text = "/".join(str(part) for part in address)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator(device).manual_seed(seed)


class Batches(Protocol):
    """A training set as the loop uses it."""

    steps_per_epoch: int
    images_per_epoch: int

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yields the batches of an epoch, counted from 0, from `first_step` on: images, labels, share of the batch."""
        ...


def _share(batch: Tensor, group: Group) -> tuple[Tensor, float]:
    """Returns this worker's part of a batch of indices, and its share of the batch.

    A worker for which no image is left takes the first one with a share of 0. It must take part in the exchange of
    gradients, and adds nothing to them.
    """
    mine = batch[group.rank :: group.size]
    return (mine, len(mine) / len(batch)) if len(mine) else (batch[:1], 0.0)


class DeviceBatches:
    """An array data set on the device, with random crops (zero padding) and flips by one gather per batch."""

    def __init__(
        self,
        images: ImageSet,
        *,
        batch: int,
        seed: int,
        device: torch.device,
        limit: int | None,
        group: Group = Group(),  # noqa: B008  # frozen
    ) -> None:
        arrays = images.arrays()
        if arrays is None:
            raise DataError(f"{images.info.name} is a tree of files, not an array")
        pixels, labels = (a[:limit] for a in arrays)
        self.padding, self.flip = images.info.crop_padding, images.info.flip
        pad = ((0, 0), (self.padding, self.padding), (self.padding, self.padding), (0, 0))
        self.size = pixels.shape[1:3]
        self.pixels = torch.from_numpy(np.pad(pixels, pad)).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.batch, self.seed, self.device, self.group = min(batch, len(pixels)), seed, device, group
        self.images_per_epoch = len(pixels)
        self.steps_per_epoch = -(-len(pixels) // self.batch)

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        order = torch.randperm(self.images_per_epoch, generator=generator_for("cpu", self.seed, "order", epoch))
        order = order.to(self.device)
        for step in range(first_step, self.steps_per_epoch):
            chosen = order[step * self.batch : (step + 1) * self.batch]
            # Crops and flips are drawn for the whole batch; each worker takes those of its images.
            mine, share = _share(torch.arange(len(chosen), device=self.device), self.group)
            yield *self._augmented(chosen, mine, generator_for(self.device, self.seed, "augment", epoch, step)), share

    def _augmented(self, chosen: Tensor, mine: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count, (height, width) = len(chosen), self.size
        rows = torch.arange(height, device=self.device).expand(count, height)
        cols = torch.arange(width, device=self.device).expand(count, width)
        if self.padding:
            offset = torch.randint(2 * self.padding + 1, (2, count, 1), generator=generator, device=self.device)
            rows, cols = rows + offset[0], cols + offset[1]
        if self.flip:
            flipped = torch.rand((count, 1), generator=generator, device=self.device) < 0.5
            cols = torch.where(flipped, cols.flip(1), cols)
        if self.group.size > 1:
            chosen, rows, cols = chosen[mine], rows[mine], cols[mine]
        pixels = self.pixels[chosen[:, None, None], rows[:, :, None], cols[:, None, :]]
        # A permuted NHWC tensor is channels-last without a copy.
        return pixels.permute(0, 3, 1, 2).float().div_(255), self.labels[chosen]


class _AugmentedTree(torch.utils.data.Dataset[tuple[Tensor, int] | DataError]):
    """Image files with an augmentation addressed by (seed, epoch, index), whichever worker computes it."""

    def __init__(self, images: ImageSet, size: int, seed: int) -> None:
        from torchvision.transforms import v2

        self.images, self.seed = images, seed
        self.transform: Any = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, int] | DataError:
        epoch, index = address
        try:
            pixels, label = self.images[index]
        except DataError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for("cpu", self.seed, "augment", epoch, index).initial_seed())
            return self.transform(torch.from_numpy(pixels).permute(2, 0, 1)), label


class TreeBatches:
    """A tree of image files decoded by DataLoader workers, with random resized crops and flips on uint8."""

    def __init__(
        self,
        images: ImageSet,
        *,
        size: int,
        batch: int,
        seed: int,
        device: torch.device,
        loaders: int,
        limit: int | None,
        group: Group = Group(),  # noqa: B008  # frozen
    ) -> None:
        self.data = _AugmentedTree(images, size, seed)
        self.indices = torch.tensor(limited(len(images), limit))
        self.images_per_epoch = len(self.indices)
        self.batch, self.seed, self.device = min(batch, len(self.indices)), seed, device
        self.loaders, self.group = loaders, group
        self.steps_per_epoch = -(-len(self.indices) // self.batch)

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        generator = generator_for("cpu", self.seed, "order", epoch)
        order = self.indices[torch.randperm(self.images_per_epoch, generator=generator)]
        whole = [order[step * self.batch : (step + 1) * self.batch] for step in range(first_step, self.steps_per_epoch)]
        shares = [_share(batch, self.group) for batch in whole]
        batches = [[(epoch, index) for index in mine.tolist()] for mine, _ in shares]
        loader = torch.utils.data.DataLoader(
            self.data,
            batch_sampler=batches,
            num_workers=self.loaders,
            collate_fn=_collate,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=self.device.type == "cuda",
        )
        for loaded, (_, share) in zip(loader, shares, strict=True):
            if isinstance(loaded, DataError):
                raise loaded
            pixels, labels = loaded
            images = pixels.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield images.float().div_(255), labels.to(self.device, non_blocking=True), share


def _collate(items: list[tuple[Tensor, int] | DataError]) -> Any:
    """Returns a batch, or the error of one of its images.

    An error raised in a worker would arrive as the text of a traceback, and block the other workers.
    """
    return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignores SIGTERM and SIGINT: sent to the whole process group, they must not end a worker within a step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
