"""Batches of training images. Each is addressed by (seed, epoch, step), so that a restart can make it again.

Arrays are held on the device as uint8 and augmented there, one batch at a time. Trees of image files are decoded by
DataLoader workers. Both give images `[B, C, H, W]` in [0, 1], labels `[B]`, and the share of the whole batch that these
are. Each batch is divided among the workers of a group. Its images and their augmentation do not depend on the number
of workers.
"""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from macer_serve.datasets import ImageSet
from macer_serve.errors import DataError
from macer_serve.hardware import usable_cores
from macer_serve.images import largest_divisor
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


def default_loaders(device: torch.device, workers: int) -> int:
    """Returns how many decoding processes a worker starts: its share of the cores, of which a GPU needs all.

    On a CPU the network itself takes the cores, and is far slower than the decoder.
    """
    share = max(1, usable_cores() // workers)
    return share if device.type == "cuda" else min(2, share)


class AugmentedTree(torch.utils.data.Dataset[tuple[Tensor, int, float] | DataError]):
    """Image files with an augmentation addressed by (seed, epoch, index), whichever worker computes it.

    The crop is chosen before the file is decoded, so that a JPEG need not be decoded finer than the crop will be.
    """

    def __init__(self, images: ImageSet, size: int, seed: int) -> None:
        from torchvision.transforms import v2

        self.images, self.seed = images, seed
        self.crop = v2.RandomResizedCrop(size)
        self.flip = v2.RandomHorizontalFlip()

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, int, float] | DataError:
        """Returns an image, its label, and the seconds that this took."""
        epoch, index = address
        began = time.monotonic()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for("cpu", self.seed, "augment", epoch, index).initial_seed())
            try:
                image, label = self._cropped(index)
            except DataError as error:
                return error
            return self.flip(image), label, time.monotonic() - began

    def _cropped(self, index: int) -> tuple[Tensor, int]:
        from torchvision.transforms.v2 import functional

        box: dict[str, int] = {}
        whole = (1, 1)

        def reduction(height: int, width: int) -> int:
            nonlocal whole
            whole = height, width
            box.update(self.crop.make_params([torch.empty(3, height, width, device="meta")]))
            finest = min(box["height"] // self.crop.size[0], box["width"] // self.crop.size[1])
            return largest_divisor(finest)

        pixels, label = self.images.reduced(index, reduction)
        down, across = pixels.shape[0] / whole[0], pixels.shape[1] / whole[1]
        # The parts of a reduced image can overhang by a fraction of a pixel.
        top, left = round(box["top"] * down), round(box["left"] * across)
        height = min(max(1, round(box["height"] * down)), pixels.shape[0] - top)
        width = min(max(1, round(box["width"] * across)), pixels.shape[1] - left)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return functional.resized_crop(image, top, left, height, width, list(self.crop.size), antialias=True), label


@dataclass
class _Rates:
    """Measures, in the first epoch, what the input delivers and what the network takes.

    It begins after some steps, since the first compile and fill the loaders' queues.
    """

    loaders: int
    workers: int
    device: torch.device
    note: Callable[[str], None]
    steps: int = 0
    images: int = 0
    decoding: float = 0.0  # seconds of one loader
    waited: float = 0.0  # seconds of the loop for the loaders
    began: float = 0.0

    def step(self, images: int, decoding: float, waited: float) -> None:
        """Counts a batch that has arrived; says what was measured when enough of them have."""
        self.steps += 1
        if self.steps == _SKIPPED:
            self._synchronise()
            self.began = time.monotonic()
        elif _SKIPPED < self.steps <= _SKIPPED + _MEASURED:
            self.images += images
            self.decoding += decoding
            self.waited += waited
            if self.steps == _SKIPPED + _MEASURED:
                self._say()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":  # twice in a run
            torch.cuda.synchronize()

    def _say(self) -> None:
        self._synchronise()
        seconds = max(time.monotonic() - self.began, 1e-9)
        delivers = self.workers * max(1, self.loaders) * self.images / max(self.decoding, 1e-9)
        takes = self.workers * self.images / max(seconds - self.waited, 1e-9)
        limit = (
            "the network is the limit"
            if takes <= delivers
            else "the input is the limit: give it more decoding processes, or pack the images once (macer pack)"
        )
        self.note(
            f"the input delivers {delivers:,.0f} images/s ({max(1, self.loaders)} decoding processes per worker), the "
            f"network takes {takes:,.0f} images/s: {limit}"
        )


_SKIPPED, _MEASURED = 10, 20  # steps


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
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._rates = _Rates(loaders, group.size, device, note)
        self.data = AugmentedTree(images, size, seed)
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
        asked = time.monotonic()
        for loaded, (_, share) in zip(loader, shares, strict=True):
            if isinstance(loaded, DataError):
                raise loaded
            pixels, labels, decoding = loaded
            self._rates.step(len(pixels), float(decoding.sum()), time.monotonic() - asked)
            images = pixels.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            yield images.float().div_(255), labels.to(self.device, non_blocking=True), share
            asked = time.monotonic()


def _collate(items: list[tuple[Tensor, int, float] | DataError]) -> Any:
    """Returns a batch, or the error of one of its images.

    An error raised in a worker would arrive as the text of a traceback, and block the other workers.
    """
    return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignores SIGTERM and SIGINT: sent to the whole process group, they must not end a worker within a step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
