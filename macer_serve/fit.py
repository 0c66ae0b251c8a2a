"""From upload to model input: a linear map whose operator norm carries a radius back to the upload.

The fit u -> x is an antialiased bilinear resize and a centre crop, so a change of the upload by delta moves
x by at most `Fit.norm` times the norm of delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from macer_serve.errors import ParameterError
from macer_serve.smoothing.noise import FRACTION_BITS
from macer_serve.smoothing.radius import round_down

# Resize weights are multiples of 2^-21: then 765 * 2^42 < 2^53 holds every partial sum of A_h u A_w^T, summed over
# three channels, so float64 computes it without any rounding. The model input is the same, bit for bit, on every
# machine and in any order of summation, as digests of it need. (Pillow's own weights have 22 bits.)
WEIGHT_BITS = 21


@dataclass(frozen=True, slots=True)
class Axis:
    """One of the two matrices of a fit, A [outputs, source size], banded: output i reads `weights[i]` at `start[i]`.

    `start` int64 [outputs], `weights` float64 [outputs, taps], multiples of 2^-21, not negative, rows sum to 1 exactly.
    """

    start: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, size: int, resized: int, offset: int, outputs: int) -> Axis:
        """Returns rows [offset, offset + outputs) of the antialiased bilinear map from `size` to `resized` samples.

        Triangle filter, half-pixel centres, support times the factor of reduction, cut off and renormalised at the
        edges: Pillow's BILINEAR, torchvision's antialias=True.
        """
        if size == resized:
            return cls(np.arange(offset, offset + outputs), np.ones((outputs, 1)))
        scale = size / resized
        support = max(scale, 1.0)
        centres = (np.arange(offset, offset + outputs) + 0.5) * scale
        taps = min(math.ceil(2 * support) + 1, size)
        start = np.clip(np.floor(centres - support).astype(np.int64), 0, size - taps)
        positions = start[:, None] + np.arange(taps) + 0.5
        triangle = np.maximum(0.0, 1.0 - np.abs(positions - centres[:, None]) / support)
        # The running sums are rounded, not the weights, so that every row sums to exactly 1.
        running = np.cumsum(triangle, axis=1)
        running = np.rint(running / running[:, -1:] * 2.0**WEIGHT_BITS)
        return cls(start, np.diff(running, axis=1, prepend=0.0) / 2.0**WEIGHT_BITS)

    @property
    def source(self) -> tuple[int, int]:
        """The range [lo, hi) of source samples that any output reads."""
        return int(self.start[0]), int(self.start[-1]) + self.weights.shape[1]

    def dense(self) -> NDArray[np.float64]:
        """Returns the matrix over its source range, float64 [outputs, hi - lo]. Elsewhere A is zero."""
        lo, hi = self.source
        matrix = np.zeros((len(self.start), hi - lo))
        columns = self.start[:, None] - lo + np.arange(self.weights.shape[1])
        matrix[np.arange(len(self.start))[:, None], columns] = self.weights
        return matrix

    def norm(self) -> float:
        """The spectral norm of A, to about 1e-13; exactly 1 if nothing is resampled."""
        if self.weights.shape[1] == 1 and len(np.unique(self.start)) == len(self.start):
            return 1.0
        matrix = self.dense()  # its Gram matrix is small, and sums of positive products lose no digits
        return math.sqrt(float(np.linalg.eigvalsh(matrix @ matrix.T)[-1]))


@dataclass(frozen=True, slots=True)
class Fit:
    """The linear map u -> x of one upload size, x = A_h u A_w^T per channel. One-channel models read (R + G + B) / 3.

    Sizes are (height, width) in pixels, as is `offset`, the crop's upper left corner. `norm` is the largest factor by
    which the map stretches an L2 distance: never below the true one. Built by `fit_for`.
    """

    upload_size: tuple[int, int]
    resize: int
    resized_size: tuple[int, int]
    crop: tuple[int, int]
    offset: tuple[int, int]
    channels: int
    norm: float
    rows: Axis = field(repr=False, compare=False)
    columns: Axis = field(repr=False, compare=False)

    @property
    def resampled(self) -> bool:
        """Whether x is neither u nor a crop of u. Then x may lie off the lattice."""
        return self.upload_size != self.resized_size or self.channels != 3

    def to_json(self) -> dict[str, Any]:
        """Returns the map as JSON values: what is needed to build it again, and its norm. Sizes are [height, width]."""
        return {
            "upload_size": list(self.upload_size),
            "resize": self.resize,
            "resized_size": list(self.resized_size),
            "crop": list(self.crop),
            "crop_offset": list(self.offset),
            "channels": self.channels,
            "norm": self.norm,
        }

    def apply(self, u: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Returns the model input: int32 [crop height, crop width, channels], in 2^-18 of an 8-bit pixel step.

        `u` is uint8 [height, width, 3] of `upload_size`. Exact, but for one rounding of each coordinate to the nearest
        integer; the same on every machine. Reads the upload band by band: some ten megabytes beside it and the result.
        Raises `ParameterError` for any other shape or type.
        """
        if u.dtype != np.uint8 or u.shape != (*self.upload_size, 3):
            raise ParameterError(f"expected uint8 pixels {(*self.upload_size, 3)}, not {u.dtype} {u.shape}")
        (top, left), (height, width) = self.offset, self.crop
        if not self.resampled:
            return u[top : top + height, left : left + width].astype(np.int32) << FRACTION_BITS
        lo, hi = self.columns.source
        gather = self.columns.start[:, None] - lo + np.arange(self.columns.weights.shape[1])
        band = max(1, 2**20 // (3 * (hi - lo)))
        x = np.empty((height, width, self.channels), np.int32)
        for i, (start, weights) in enumerate(zip(self.rows.start, self.rows.weights, strict=True)):
            row = np.zeros(3 * (hi - lo))
            for at in range(0, len(weights), band):
                part = weights[at : at + band]
                row += part @ u[start + at : start + at + len(part), lo:hi].reshape(len(part), -1).astype(np.float64)
            line = np.einsum("wtc,wt->wc", row.reshape(-1, 3)[gather], self.columns.weights)
            if self.channels == 1:  # sum first, divide once: R = G = B stays on the lattice
                line = line.sum(axis=1, keepdims=True)
            x[i] = np.rint(line * 2.0**FRACTION_BITS / (3 if self.channels == 1 else 1))
        return x


@lru_cache(maxsize=256)
def fit_for(upload_size: tuple[int, int], resize: int, crop: tuple[int, int], channels: int = 3) -> Fit:
    """Returns the fit of uploads of (height, width): short side to `resize`, then centre crop to `crop`.

    The long side follows by torchvision's rule, rounded down. `channels` is the model's, 3 or 1. Raises
    `ParameterError` unless sizes are positive and `resize` covers the crop.
    """
    if min(upload_size) < 1 or min(crop) < 1 or resize < max(crop) or channels not in (1, 3):
        raise ParameterError(
            f"a fit needs positive sizes, resize >= both sides of the crop, and 1 or 3 channels, not "
            f"{upload_size}, resize = {resize}, crop = {crop}, channels = {channels}"
        )
    short, long = sorted(upload_size)
    scaled = int(resize * long / short)
    resized = (resize, scaled) if upload_size[0] <= upload_size[1] else (scaled, resize)
    offset = (round((resized[0] - crop[0]) / 2.0), round((resized[1] - crop[1]) / 2.0))
    rows, columns = (Axis.of(*sizes) for sizes in zip(upload_size, resized, offset, crop, strict=True))
    norm = rows.norm() * columns.norm() * (1.0 if channels == 3 else 1.0 / math.sqrt(3.0))
    fit = Fit(upload_size, resize, resized, crop, offset, channels, norm, rows, columns)
    # Far more than the error of the computed norm, so that radii err on the safe side.
    return replace(fit, norm=norm * (1.0 + 1e-12)) if fit.resampled else fit


def upload_radius(radius: float, fit: Fit, dims: int) -> float:
    """Returns the L2 radius around the upload that follows from `radius` around the model input.

    (R - 2 sqrt(d) / (510 * 2^18) - 1e-9) / norm, rounded down, never below 0: x and its neighbour are each rounded to
    18 fractional bits. `dims` = d counts the model input's coordinates. Exactly `radius` where nothing is resampled.
    """
    if not fit.resampled:
        return radius
    return round_down(max(0.0, radius - 2.0 * math.sqrt(dims) / (510 * 2**FRACTION_BITS) - 1e-9) / fit.norm)
