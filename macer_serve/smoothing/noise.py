"""Noise as a random-access stream. Copy j of an input depends on (seed, purpose, j) and on nothing else.

The exact stream, version `exact-lattice/1` (normative: every engine is held to integer equality)
-------------------------------------------------------------------------------------------------
Adding Gaussian noise in floating point voids the theorem (Voracek & Hein 2023). Instead we serve the smoothed
version of f o Q, where Q rounds to the pixel lattice (1/255) Z^d, and draw Q(x + eps) itself: integers.

*Input.* x is fixed point, `int32` with 18 fractional bits of a lattice step, coordinates in HWC order;
d is their number. Write x_i = m_i + f_i with m_i = floor(x_i + 1/2) and f_i in [-1/2, 1/2).

*Bits.* Coordinate i of copy j has a 64-bit U = index * 2^48 + low. With D(role) the SHA-256 digest of
b"macer-serve exact-lattice/1\\0" + purpose + b"\\0" + role + b"\\0" + seed (128-bit seed):
- index: Philox4x64-10, key = the first two little-endian 64-bit words of D("index"), block number
  j * ceil(d / 16) + floor(i / 16) as its 256-bit counter; the block's four words hold sixteen 16-bit
  indices, lowest bits first; coordinate i takes number i mod 16.
- low: Philox4x32-10, key = the first two little-endian 32-bit words of D("low"); the 128-bit counter is
  j * d + i in its low half, the second 64-bit word of D("low") in its high half; low = w0 + 2^32 (w1 mod 2^16).

*Value.* With s = 255 sigma, U stands for eps = s Phi^-1(U / 2^64). Coordinate i becomes
z_i = m_i - M + #{j in 0..2M : U >= T_j(f_i)}, M = ceil(9.1 s), where T_j(f) = floor(2^64 Phi(a_j)) -
trunc(2^64 c_j(f)), kept within [0, 2^64 - 1], a_j = (j - M + 1/2) / s, and c_j is the Taylor series of
Phi(a_j) - Phi(a_j - f / s), K terms (`_terms`), its coefficients rounded to double from 150 bits, evaluated by
Horner's rule in IEEE doubles. So on the lattice (f = 0) the thresholds are exact integers. Nothing is clipped.

*Law.* z differs from Q(x + eps) by at most `tau` in total variation; certificates subtract it.

The other stream, `gaussian/1`, adds a float32 Gaussian as papers do. Its certificates say so.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import mpmath
import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from macer_serve.errors import ParameterError
from macer_serve.smoothing.philox import philox4x32
from macer_serve.smoothing.votes import Purpose

FixedPoint = npt.NDArray[np.int32]
FRACTION_BITS = 18
LATTICE_STEPS = 255  # lattice steps in the unit of pixel values
NoiseKind = Literal["exact", "gaussian"]

_ONE, _HALF = 1 << FRACTION_BITS, 1 << (FRACTION_BITS - 1)
_STRADDLES = np.int16(-32768)  # in the table: this index does not determine the value
_CHUNK = 1 << 17  # coordinates worked on at a time: they stay in cache


def as_pixels(copies: npt.NDArray[Any], scale: float) -> npt.NDArray[np.float32]:
    """Returns noisy copies `[k, H, W, C]` as a network's input: pixel values `float32 [k, C, H, W]`."""
    return np.ascontiguousarray(copies.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(scale))


class Noise(Protocol):
    """A stream of noisy copies of inputs of one shape. Pixel values in [0, 1] are `scale` times what is drawn.

    `name` names the stream with its version in records. `caveat` stands in a certificate's statement: what keeps it
    from being exact, or nothing.
    """

    name: str
    caveat: str
    sigma: float
    dtype: np.dtype[Any]
    scale: float

    def sample(self, x: FixedPoint, seed: bytes, purpose: Purpose, start: int, stop: int) -> npt.NDArray[Any]:
        """Returns the noisy copies [start, stop) of x `[H, W, C]`: `[stop - start, H, W, C]` of `dtype`."""
        ...

    def tau(self, x: FixedPoint) -> float:
        """Returns a bound on the total variation distance between a copy's law and the law that is certified."""
        ...


@dataclass(frozen=True, slots=True)
class LatticeTables:
    """The tables of the exact stream for one sigma. The module's text explains the symbols."""

    reach: int  # M
    thresholds: npt.NDArray[np.uint64]  # floor(2^64 Phi(a_j)), j = 0..2M
    taylor: npt.NDArray[np.float64]  # [K, 2M + 1], 2^64 times the coefficients of f^1 ... f^K
    on_lattice: npt.NDArray[np.int16]  # [65536] the value for f = 0, or _STRADDLES
    bracket: npt.NDArray[np.int32]  # [65536, 2] fixed-point bounds of eps


def _terms(s: float) -> int:
    """Returns K, the smallest number of Taylor terms with a remainder below 2^-66.

    By |He_k(a) phi(a)| <= sqrt(k!).
    """
    h, k = 0.5 / s, 1
    while h ** (k + 1) / math.sqrt(math.factorial(k + 1)) > 2.0**-66:
        k += 1
    return k


@functools.lru_cache(maxsize=16)
def lattice_tables(sigma: float) -> LatticeTables:
    """Returns the tables of one sigma (pixel values in [0, 1]). Raises `ParameterError` outside [0.005, 4]."""
    if not 0.005 <= sigma <= 4.0:
        raise ParameterError(f"sigma must lie in [0.005, 4] for exact noise, not {sigma}")
    with mpmath.workprec(150):
        s = LATTICE_STEPS * mpmath.mpf(sigma)
        reach, terms = int(mpmath.ceil(s * mpmath.mpf("9.1"))), _terms(float(s))
        thresholds = np.empty(2 * reach + 1, dtype=np.uint64)
        taylor = np.empty((terms, 2 * reach + 1), dtype=np.float64)
        scale = mpmath.mpf(2) ** 64
        factors = [scale / (mpmath.factorial(k) * s**k) for k in range(1, terms + 1)]
        for j in range(2 * reach + 1):
            a = (j - reach + mpmath.mpf("0.5")) / s
            thresholds[j] = int(mpmath.floor(scale * mpmath.ncdf(a)))
            density = mpmath.npdf(a)
            hermite, previous = mpmath.mpf(1), mpmath.mpf(0)  # He_k(a) and He_(k-1)(a)
            for k in range(terms):
                taylor[k, j] = float(factors[k] * density * hermite)
                hermite, previous = a * hermite - k * previous, hermite
    index = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
    low, high = (
        np.searchsorted(thresholds, u, side="right").astype(np.int16) - np.int16(reach)
        for u in (index, index | np.uint64((1 << 48) - 1))
    )
    # The bracket is widened by two fixed-point steps, far more than the error of a quantile in double precision.
    with np.errstate(divide="ignore"):
        edges = ndtri(np.arange(65537) / 65536.0) * float(s) * _ONE
    # Only the infinite ends are cut. At the largest sigma the finite ends reach 1.12e9, and room is left to add x.
    edges = np.clip(edges, -(2.0**31 - 2.0**20), 2.0**31 - 2.0**20)
    bracket = np.stack([np.floor(edges[:-1]) - 2, np.ceil(edges[1:]) + 2], axis=1).astype(np.int32)
    return LatticeTables(
        reach=reach,
        thresholds=thresholds,
        taylor=taylor,
        on_lattice=np.where(low == high, low, _STRADDLES).astype(np.int16),
        bracket=np.ascontiguousarray(bracket),
    )


def _digest(stream: str, purpose: Purpose, role: str, seed: bytes) -> bytes:
    if len(seed) != 16:
        raise ParameterError(f"a seed has 128 bits, not {8 * len(seed)}")
    return hashlib.sha256(
        b"\0".join([f"macer-serve {stream}".encode(), purpose.encode(), role.encode(), seed])
    ).digest()


def is_on_lattice(x: FixedPoint) -> bool:
    """Returns whether every coordinate of x is a whole number of lattice steps."""
    return not bool((x & (_ONE - 1)).any())


class ExactNoise:
    """Q(x + eps) drawn exactly, as lattice integers. The module's text specifies the stream."""

    name = "exact-lattice/1"
    caveat = ""
    dtype: np.dtype[Any] = np.dtype(np.int16)
    scale = 1.0 / LATTICE_STEPS

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma
        self.tables = lattice_tables(sigma)

    def tau(self, x: FixedPoint) -> float:
        """Returns d times a bound on the sum of the threshold errors of one coordinate.

        That sum bounds the coordinate's total variation distance.
        """
        cells = len(self.tables.thresholds) + 2
        error = 2.0**-64
        if not is_on_lattice(x):
            # Truncation, the series' remainder, and Horner's rounding of at most phi(0) f / s <= 0.2 / s.
            terms = len(self.tables.taylor)
            error += 2.0**-64 + 2.0**-66 + 2 * (terms + 2) * 2.0**-52 * 0.2 / (LATTICE_STEPS * self.sigma)
        return float(x.size * cells * error)

    def keys(self, seed: bytes, purpose: Purpose) -> npt.NDArray[np.uint64]:
        """Returns both words of D("index") and both words of D("low"), `uint64 [4]`."""
        digests = (_digest(self.name, purpose, role, seed)[:16] for role in ("index", "low"))
        return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)

    def sample(self, x: FixedPoint, seed: bytes, purpose: Purpose, start: int, stop: int) -> npt.NDArray[np.int16]:
        """Returns the noisy copies [start, stop) of x `int32 [H, W, C]`, in lattice steps: `int16 [k, H, W, C]`."""
        flat = np.ascontiguousarray(x).reshape(-1)
        whole = (flat + np.int32(_HALF)) >> FRACTION_BITS
        fraction = flat - (whole << FRACTION_BITS)
        on_lattice = not fraction.any()
        base = whole.astype(np.int16)
        keys = self.keys(seed, purpose)
        indices, low_key = _IndexStream(keys[:2], flat.size), keys[2:].astype("<u8").view("<u4")
        out = np.empty((stop - start, flat.size), dtype=np.int16)
        chunk = max(1, _CHUNK // flat.size)
        straddlers, their_index = [], []
        for first in range(start, stop, chunk):
            last = min(first + chunk, stop)
            rows = out[first - start : last - start]
            index = indices.read(first, last)
            if on_lattice:
                np.take(self.tables.on_lattice, index, out=rows, mode="clip")
                found = np.flatnonzero(rows == _STRADDLES)
            else:
                bounds = np.take(self.tables.bracket, index, axis=0, mode="clip")
                bounds += (fraction + np.int32(_HALF))[:, None]
                bounds >>= FRACTION_BITS
                rows[...] = bounds[..., 0]
                found = np.flatnonzero(bounds[..., 0] != bounds[..., 1])
            their_index.append(index.reshape(-1)[found])
            found += (first - start) * flat.size
            straddlers.append(found)
        # All chunks together: many small steps would make the threads wait for the interpreter lock.
        if straddlers and (where := np.concatenate(straddlers)).size:
            out.reshape(-1)[where] = self._refine(where, np.concatenate(their_index), start, fraction, low_key)
        out += base
        return out.reshape(stop - start, *x.shape)

    def _refine(
        self,
        straddlers: npt.NDArray[np.intp],
        index: npt.NDArray[np.uint16],
        first: int,
        fraction: npt.NDArray[np.int32],
        key: npt.NDArray[np.uint32],
    ) -> npt.NDArray[np.int16]:
        """Returns z - m at the given places of the copies from `first` on, by all 64 bits of U."""
        size, tables = len(fraction), self.tables
        address = straddlers.astype(np.uint64) + np.uint64(first * size)
        full = np.full_like(address, 0)
        words = philox4x32(
            (
                address & np.uint64(0xFFFFFFFF),
                address >> np.uint64(32),
                full + np.uint64(key[2]),
                full + np.uint64(key[3]),
            ),
            (int(key[0]), int(key[1])),
        )
        u = (index.astype(np.uint64) << np.uint64(48)) | ((words[1] & np.uint64(0xFFFF)) << np.uint64(32)) | words[0]
        count = np.searchsorted(tables.thresholds, u, side="right")
        f = fraction[straddlers % size].astype(np.float64) / _ONE
        if f.any():
            # |f| <= 1/2 moves the value by at most one cell, so that only the two neighbouring thresholds matter.
            top = len(tables.thresholds) - 1
            below = (count == 0) | (u >= self._threshold(np.maximum(count - 1, 0), f))
            above = (count <= top) & (u >= self._threshold(np.minimum(count, top), f))
            count = count - 1 + below + above
        return (count - tables.reach).astype(np.int16)

    def _threshold(self, j: npt.NDArray[np.intp], f: npt.NDArray[np.float64]) -> npt.NDArray[np.uint64]:
        """Returns T_j(f), for f in lattice steps."""
        correction = np.zeros_like(f)
        for coefficients in self.tables.taylor[::-1]:
            correction = (correction + coefficients[j]) * f
        base = self.tables.thresholds[j]
        size = np.abs(correction).astype(np.uint64)
        room = np.uint64(2**64 - 1) - base
        return np.where(correction >= 0, base - np.minimum(size, base), base + np.minimum(size, room))


class _IndexStream:
    """The 16-bit indices of one seed's stream, addressed by copy."""

    def __init__(self, key: npt.NDArray[np.uint64], size: int) -> None:
        self.key, self.size, self.blocks = key, size, -(-size // 16)

    def read(self, first: int, last: int) -> npt.NDArray[np.uint16]:
        """Returns the indices of the copies [first, last): `uint16 [last - first, size]`."""
        # NumPy increments the counter before its first use.
        counter = (first * self.blocks - 1) % (1 << 256)
        generator = np.random.Philox(counter=counter, key=self.key)
        words = generator.random_raw((last - first) * self.blocks * 4)
        indices = words.astype("<u8", copy=False).view("<u2").reshape(last - first, self.blocks * 16)
        return indices[:, : self.size]


class GaussianNoise:
    """x + eps in float32, as the papers' code does. Certificates hold only up to floating-point error."""

    name = "gaussian/1"
    caveat = "up to floating-point error of the added noise"
    dtype: np.dtype[Any] = np.dtype(np.float32)
    scale = 1.0

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def tau(self, x: FixedPoint) -> float:
        """Returns 0: the floating-point error of this stream has no bound that could be subtracted."""
        return 0.0

    def sample(self, x: FixedPoint, seed: bytes, purpose: Purpose, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Returns the noisy copies [start, stop) of x `int32 [H, W, C]`, in pixel values: `float32 [k, H, W, C]`."""
        pixels = (x / (_ONE * LATTICE_STEPS)).astype(np.float32)
        key = np.frombuffer(_digest(self.name, purpose, "normal", seed)[:16], dtype="<u8").astype(np.uint64)
        out = np.empty((stop - start, *x.shape), dtype=np.float32)
        for copy in range(start, stop):
            # A normal takes a varying number of words. Each copy therefore has a counter range of its own.
            generator = np.random.Generator(np.random.Philox(counter=copy << 64, key=key))
            generator.standard_normal(out=out[copy - start], dtype=np.float32)
        out *= np.float32(self.sigma)
        out += pixels
        return out


# Streams by the name that configurations give them. A new stream is a new entry.
STREAMS: dict[NoiseKind, type[ExactNoise] | type[GaussianNoise]] = {"exact": ExactNoise, "gaussian": GaussianNoise}


def noise_for(kind: NoiseKind, sigma: float) -> Noise:
    """Returns the stream of a name of `STREAMS`. Raises `ParameterError` for another name."""
    if kind not in STREAMS:
        raise ParameterError(f"noise must be {' or '.join(STREAMS)}, not {kind!r}")
    return STREAMS[kind](sigma)


def kind_of(name: str) -> NoiseKind | None:
    """Returns the kind of the stream that a record names, None if no stream has that name."""
    return next((kind for kind, stream in STREAMS.items() if stream.name == name), None)


def caveat_of(name: str) -> str:
    """Returns what a statement says of the stream that a record names. An unknown stream is not called exact."""
    kind = kind_of(name)
    return GaussianNoise.caveat if kind is None else STREAMS[kind].caveat
