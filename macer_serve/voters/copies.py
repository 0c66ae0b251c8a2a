"""Where a voter's noisy copies are made: on the host, or on the engine's own device."""

from __future__ import annotations

import logging
import os
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from macer_serve.smoothing.noise import FixedPoint, Noise
from macer_serve.smoothing.votes import Purpose

log = logging.getLogger(__name__)


class CopySource(Protocol):
    """Makes noisy copies in buffers of its own kind. `name` stands in the names of engines, nothing for the host's."""

    name: str | None

    def buffer(self, size: int) -> Any:
        """Returns room for `size` copies `[size, H, W, C]`, all zero. It can be sliced and assigned to."""
        ...

    def fill(self, rows: Any, x: FixedPoint, seed: bytes, purpose: Purpose, start: int) -> None:
        """Writes the copies from `start` on of x `int32 [H, W, C]` into rows of a buffer."""
        ...


class HostCopies:
    """Noisy copies made by NumPy, in arrays."""

    name: str | None = None

    def __init__(self, noise: Noise, shape: tuple[int, int, int]) -> None:
        self._noise, self._shape = noise, shape

    def buffer(self, size: int) -> npt.NDArray[Any]:
        return np.zeros((size, *self._shape), dtype=self._noise.dtype)

    def fill(self, rows: npt.NDArray[Any], x: FixedPoint, seed: bytes, purpose: Purpose, start: int) -> None:
        rows[...] = self._noise.sample(x, seed, purpose, start, start + len(rows))


def device_copies(noise: Noise, shape: tuple[int, int, int], device: str) -> CopySource | None:
    """Returns copies of `shape` (H, W, C) made on the device, or None if the host is to make them.

    Hardware and packages decide. On a CPU only Triton's interpreter runs the kernel, for tests (`TRITON_INTERPRET=1`).
    Raises `EngineError` if the device gives other integers than the stream's.
    """
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from macer_serve.voters.triton_noise import triton_copies
    except ModuleNotFoundError as error:
        log.warning("%s is not installed: the noise is drawn on the host, votes will be slower", error.name)
        return None
    return triton_copies(noise, shape, device)
