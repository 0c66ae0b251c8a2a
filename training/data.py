"""Batches: addressed by (seed, epoch, step), so that any step can be made again after a restart.

Arrays are held on the device as uint8 and augmented there, a batch at a time; trees of image files
stream through DataLoader workers. Both give images `[B, C, H, W]` in [0, 1], labels `[B]`, and the share of the whole
batch that these are. Each batch is divided among the workers of a group: the same images, augmented the same way,
whatever their number.
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
    """A generator seeded by a digest of its address: no state to save, none to lose."""
    text = "/".join(str(part) for part in address)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator(device).manual_seed(seed)


class Batches(Protocol):
    """A training set as the loop sees it."""

    steps_per_epoch: int
    images_per_epoch: int

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The batches of one epoch (from 0), beginning at `first_step`: images, labels, share of the whole batch."""
        ...


def _share(batch: Tensor, group: Group) -> tuple[Tensor, float]:
    """This worker's part of a batch of indices, and which share of it that is.

    A worker for which nothing is left takes an image that is another's, with a share of 0: it must take part in the
    exchange of gradients, and adds nothing to them.
    """
    mine = batch[group.rank :: group.size]
    return (mine, len(mine) / len(batch)) if len(mine) else (batch[:1], 0.0)


class DeviceBatches:
    """An array data set on the device: random crop (zero padding) and flip by one gather a batch."""

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
            # Where and whether each image is moved is drawn for the whole batch, and taken by share.
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
        # A permuted NHWC tensor *is* channels-last: no copy is made for the memory format.
        return pixels.permute(0, 3, 1, 2).float().div_(255), self.labels[chosen]


class _AugmentedTree(torch.utils.data.Dataset[tuple[Tensor, int] | DataError]):
    """Files with an augmentation addressed by (seed, epoch, index), whichever worker makes it."""

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
    """An ImageFolder tree streamed by DataLoader workers: random resized crop and flip on uint8."""

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
    """A batch, or what is wrong with one of its images.

    As a value: raised in a worker it would arrive as the text of a traceback, and hold the other workers.
    """
    return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)


def _leave_signals_to_the_parent(worker: int) -> None:
    """A stop sent to the whole process group must not take the workers from the step that is under way."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
