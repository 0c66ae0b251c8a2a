"""The exact noise stream on a GPU: one Triton kernel, integer-equal to `macer_serve.smoothing.noise.ExactNoise`.

The kernel follows the text of `smoothing/noise.py` step by step and reads the same tables. It writes lattice integers,
as the host does: what runs behind it is then the same function, with the same fingerprint, whichever of the two makes
the copies. The compiled network begins with scale, cast and normalisation in one fused kernel, so that doing these
here, too, would save two bytes of traffic per coordinate, against some hundred thousand operations of the network.

Doubles are evaluated without fused multiply-add (`OPTIONS`), since the specification rounds after each operation.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from macer_serve.errors import EngineError
from macer_serve.smoothing.noise import ExactNoise, FixedPoint, Noise, is_on_lattice
from macer_serve.smoothing.votes import Purpose

log = logging.getLogger(__name__)

NAME = "triton"  # in the names of engines
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}
BLOCKS = 64  # Philox blocks of sixteen coordinates per program
LEAST_CAPABILITY = (8, 0)  # the kernel is compiled for sm_80 and sm_90 in tests

_FRACTION_BITS = tl.constexpr(18)
_HALF = tl.constexpr(1 << 17)
_FRACTION = tl.constexpr(2.0**-18)
_STRADDLES = tl.constexpr(-32768)


@triton.jit  # type: ignore[untyped-decorator]
def _threshold(j, f, active, thresholds, taylor, entries: tl.constexpr, terms: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns T_j(f), uint64."""
    correction = f * 0.0
    for step in tl.static_range(terms):
        coefficient = tl.load(taylor + (terms - 1 - step) * entries + j, mask=active, other=0.0)
        correction = (correction + coefficient) * f
    base = tl.load(thresholds + j, mask=active, other=0)
    size = tl.abs(correction).to(tl.uint64)
    lower = base - tl.minimum(size, base)
    largest = (base & 0) - 1  # `~base` and 2^64 - 1 - base fail in the interpreters of some versions of Triton
    upper = base + tl.minimum(size, largest - base)
    return tl.where(correction >= 0, lower, upper)


@triton.jit  # type: ignore[untyped-decorator]
def noisy_copies(  # type: ignore[no-untyped-def]
    out,  # int16 [copies, size]
    x,  # int32 [size]
    stream,  # uint64 [5]: both words of D("index"), both of D("low"), the first copy
    thresholds,  # uint64 [entries]
    taylor,  # float64 [terms, entries]
    on_lattice,  # int16 [65536]
    bracket,  # int32 [65536, 2]
    size,
    lattice: tl.constexpr,
    entries: tl.constexpr,
    bisections: tl.constexpr,
    terms: tl.constexpr,
    blocks: tl.constexpr,
):
    """Writes blocks * 16 coordinates of one noisy copy. One-dimensional grid, the copies' chunks one after another."""
    chunks = tl.cdiv(size, blocks * 16)
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    copy = tl.load(stream + 4) + row.to(tl.uint64)

    # The four words of a Philox block hold sixteen indices, lowest bits first.
    block = (chunk * blocks + tl.arange(0, blocks)).to(tl.uint64)
    counter = copy * tl.cdiv(size, 16).to(tl.uint64) + block
    zero = counter & 0
    w0, w1, w2, w3 = tl.philox_impl(counter, zero, zero, zero, tl.load(stream), tl.load(stream + 1))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (blocks, 4, 1))
    shifts = (tl.arange(0, 4) * 16).to(tl.uint64)[None, None, :]
    wide = tl.reshape((words >> shifts) & 0xFFFF, (blocks * 16,))
    index = wide.to(tl.int32)

    i = chunk * blocks * 16 + tl.arange(0, blocks * 16)
    inside = i < size
    pixel = tl.load(x + i, mask=inside, other=0)
    whole = (pixel + _HALF) >> _FRACTION_BITS
    fraction = pixel - (whole << _FRACTION_BITS)
    if lattice:
        value = tl.load(on_lattice + index, mask=inside, other=0).to(tl.int32)
        straddles = inside & (value == _STRADDLES)
    else:
        value = (tl.load(bracket + 2 * index, mask=inside, other=0) + (fraction + _HALF)) >> _FRACTION_BITS
        highest = (tl.load(bracket + 2 * index + 1, mask=inside, other=0) + (fraction + _HALF)) >> _FRACTION_BITS
        straddles = inside & (value != highest)

    # All 64 bits of U decide where the index does not. Only such coordinates read the tables.
    address = copy * size.to(tl.uint64) + i.to(tl.uint64)
    key, half_counter = tl.load(stream + 2), tl.load(stream + 3)
    low_address = (address & 0xFFFFFFFF).to(tl.uint32)
    v0, v1, _, _ = tl.philox_impl(
        low_address,
        (address >> 32).to(tl.uint32),
        (low_address & 0) + (half_counter & 0xFFFFFFFF).to(tl.uint32),
        (low_address & 0) + (half_counter >> 32).to(tl.uint32),
        (key & 0xFFFFFFFF).to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    u = (wide << 48) | ((v1 & 0xFFFF).to(tl.uint64) << 32) | v0.to(tl.uint64)
    count = i * 0  # of thresholds at most u, by bisection
    above = count + entries
    for _ in tl.static_range(bisections):
        middle = (count + above) >> 1
        open_ = count < above
        reached = open_ & (u >= tl.load(thresholds + middle, mask=straddles & open_, other=0))
        count = tl.where(reached, middle + 1, count)
        above = tl.where(open_ & ~reached, middle, above)
    if not lattice:
        # |f| <= 1/2 moves the value by at most one cell, so that only the two neighbouring thresholds matter.
        f = fraction.to(tl.float64) * _FRACTION
        under, over = tl.maximum(count - 1, 0), tl.minimum(count, entries - 1)
        passes_under = (count == 0) | (u >= _threshold(under, f, straddles, thresholds, taylor, entries, terms))
        passes_over = (count < entries) & (u >= _threshold(over, f, straddles, thresholds, taylor, entries, terms))
        count = count - 1 + passes_under.to(tl.int32) + passes_over.to(tl.int32)
    value = tl.where(straddles, count - entries // 2, value)
    tl.store(out + row.to(tl.int64) * size + i, (value + whole).to(tl.int16), mask=inside)


def constants_of(noise: ExactNoise, blocks: int) -> dict[str, Any]:
    """Returns the kernel's constants for one sigma, `lattice` aside. Each choice is compiled once."""
    terms, entries = noise.tables.taylor.shape
    return {"entries": entries, "bisections": entries.bit_length(), "terms": terms, "blocks": blocks}


class TritonCopies:
    """Noisy copies made on the device, one launch per piece; see `macer_serve.voters.copies.CopySource`.

    `TRITON_INTERPRET=1`, set before Triton is imported, runs the kernel on the CPU by Triton's interpreter.
    """

    name: str | None = NAME

    def __init__(
        self, noise: ExactNoise, shape: tuple[int, int, int], device: torch.device, blocks: int = BLOCKS
    ) -> None:
        self._noise, self._shape, self._size, self._device = noise, shape, int(np.prod(shape)), device
        tables = noise.tables
        self.tables = [
            torch.from_numpy(np.ascontiguousarray(table)).to(device, copy=True)
            for table in (tables.thresholds, tables.taylor, tables.on_lattice, tables.bracket)
        ]
        self._constants = constants_of(noise, blocks)

    def buffer(self, size: int) -> Tensor:
        return torch.zeros((size, *self._shape), dtype=torch.int16, device=self._device)

    def fill(self, rows: Tensor, x: FixedPoint, seed: bytes, purpose: Purpose, start: int) -> None:
        stream = np.append(self._noise.keys(seed, purpose), np.uint64(start))
        grid = (len(rows) * triton.cdiv(self._size, self._constants["blocks"] * 16),)
        noisy_copies[grid](
            rows,
            torch.from_numpy(np.ascontiguousarray(x).reshape(-1)).to(self._device),
            torch.from_numpy(stream).to(self._device),
            *self.tables,
            self._size,
            lattice=is_on_lattice(x),
            **self._constants,
            **OPTIONS,
        )


def triton_copies(noise: Noise, shape: tuple[int, int, int], device: str) -> TritonCopies | None:
    """Returns copies of `shape` (H, W, C) made on the device, or None, with a word in the log, if it cannot make them.

    The hardware and the kind of noise decide. Raises `EngineError` if the kernel cannot be run there, or does not give
    the specified stream.
    """
    if not isinstance(noise, ExactNoise):
        log.info("the stream %s is drawn on the host: the kernel draws %s", noise.name, ExactNoise.name)
        return None
    if device != "cpu" and not torch.cuda.is_available():
        log.warning("torch sees no GPU: the noise is drawn on the host, votes will be slower")
        return None
    if device != "cpu" and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        log.warning("this GPU is older than the noise kernel is made for: the noise is drawn on the host, slower")
        return None
    copies = TritonCopies(noise, shape, torch.device("cpu" if device == "cpu" else "cuda"))
    require_the_stream(copies, noise, shape)
    log.info("the noise is drawn by a kernel on %s", device)
    return copies


def require_the_stream(copies: TritonCopies, noise: ExactNoise, shape: tuple[int, int, int]) -> None:
    """Raises `EngineError` unless a few copies, on the lattice and off it, are the specified integers."""
    ramp = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape) % 256
    for x in (ramp << 18, (ramp << 18) + 1001 * ramp):
        rows = copies.buffer(2)
        try:
            copies.fill(rows, x, bytes(16), "selection", 5)
            made = rows.cpu().numpy()
        except Exception as error:  # Triton's and the driver's own errors
            raise EngineError(f"the noise kernel cannot be run here: {error}") from error
        if not np.array_equal(made, noise.sample(x, bytes(16), "selection", 5, 7)):
            raise EngineError("the noise kernel of this device does not give the specified stream")
