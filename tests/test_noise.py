"""The noise stream is the normative one, bit for bit; its law is the exact one; every part of it is independent.

Statistical tests use exact critical values at a false-alarm rate of 1e-6 each, and fixed seeds.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from fractions import Fraction
from typing import get_args

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binom, chi2, kstest

from macer_serve.errors import ParameterError
from macer_serve.smoothing.noise import (
    FRACTION_BITS,
    ExactNoise,
    FixedPoint,
    GaussianNoise,
    NoiseKind,
    lattice_tables,
    noise_for,
)
from macer_serve.smoothing.philox import philox4x32
from macer_serve.smoothing.votes import Purpose

SEED = bytes(range(16))
FALSE_ALARM = 1e-6
STEP = 1 << FRACTION_BITS


def lattice(*values: int, shape: tuple[int, int, int]) -> FixedPoint:
    return (np.resize(np.array(values, dtype=np.int32), shape) << FRACTION_BITS).astype(np.int32)


def off_lattice(shape: tuple[int, int, int], seed: int = 0) -> FixedPoint:
    """Random fixed point, with the corner cases among its fractions."""
    x = np.random.default_rng(seed).integers(0, 255 * STEP, shape, dtype=np.int32)
    flat = x.reshape(-1)
    corners = [0, 1, STEP // 2 - 1, STEP // 2, STEP // 2 + 1, STEP - 1]
    flat[: len(corners)] = [(100 << FRACTION_BITS) + c for c in corners][: flat.size]
    return x


# --- Philox ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox4x32_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = (np.array([int(w, 16)] * 3, dtype=np.uint64) for w in counter.split())
    k0, k1 = (int(w, 16) for w in key.split())
    for got, want in zip(philox4x32((c0, c1, c2, c3), (k0, k1)), words.split(), strict=True):
        assert got.tolist() == [int(want, 16)] * 3


def philox(counter: int, key: int, bits: int) -> list[int]:
    """Philox4x{bits}-10 in Python's integers, after Salmon et al. 2011."""
    multipliers, bumps = {
        32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
        64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
    }[bits]
    mask = (1 << bits) - 1
    c = [counter >> (bits * i) & mask for i in range(4)]
    k = [key & mask, key >> bits & mask]
    for _ in range(10):
        p, q = c[0] * multipliers[0], c[2] * multipliers[1]
        c = [q >> bits ^ c[1] ^ k[0], q & mask, p >> bits ^ c[3] ^ k[1], p & mask]
        k = [(k[i] + bumps[i]) & mask for i in (0, 1)]
    return c


def test_the_slow_philox_gives_the_known_answers_too() -> None:
    assert philox(0, 0, 32) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((1 << 128) - 1, (1 << 64) - 1, 32) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(0, 0, 64) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@settings(max_examples=50)
@given(st.integers(0, (1 << 256) - 1), st.integers(0, (1 << 128) - 1))
def test_numpys_philox_is_addressed_from_one_before_its_counter(block: int, key: int) -> None:
    generator = np.random.Philox(
        counter=(block - 1) % (1 << 256), key=np.array([key & (2**64 - 1), key >> 64], dtype=np.uint64)
    )
    assert generator.random_raw(8).tolist() == philox(block, key, 64) + philox((block + 1) % (1 << 256), key, 64)


# --- the normative stream, written a second time --------------------------------------------------------------------


class Slow:
    """The module text of noise.py in Python's integers, mpmath at 80 digits and IEEE doubles for the series alone."""

    def __init__(self, sigma: float) -> None:
        with mpmath.workdps(80):
            self.s = 255 * mpmath.mpf(sigma)
            self.M = int(mpmath.ceil(self.s * 91 / 10))
            self.K, h = 1, 1 / (2 * self.s)
            while h ** (self.K + 1) / mpmath.sqrt(mpmath.factorial(self.K + 1)) > mpmath.mpf(2) ** -66:
                self.K += 1

    def a(self, j: int) -> mpmath.mpf:
        return (mpmath.mpf(2 * (j - self.M) + 1) / 2) / self.s

    @functools.cache  # noqa: B019
    def threshold0(self, j: int) -> int:
        with mpmath.workdps(80):
            return int(mpmath.floor(mpmath.mpf(2) ** 63 * mpmath.erfc(-self.a(j) / mpmath.sqrt(2))))

    @functools.cache  # noqa: B019
    def coefficients(self, j: int) -> list[float]:
        """2^64 (-1)^(k+1) / (k! s^k) times the k-th derivative of Phi, by Hermite polynomials of the physicists."""
        with mpmath.workdps(80):
            a, density = self.a(j), mpmath.exp(-(self.a(j) ** 2) / 2) / mpmath.sqrt(2 * mpmath.pi)
            return [
                float(
                    mpmath.mpf(2) ** 64 / (mpmath.factorial(k) * self.s**k) * density
                    * mpmath.mpf(2) ** (mpmath.mpf(1 - k) / 2) * mpmath.hermite(k - 1, a / mpmath.sqrt(2))
                )
                for k in range(1, self.K + 1)
            ]  # fmt: skip

    def threshold(self, j: int, f: float) -> int:
        if f == 0:
            return self.threshold0(j)
        correction = 0.0
        for c in reversed(self.coefficients(j)):
            correction = (correction + c) * f
        return min(max(self.threshold0(j) - int(correction), 0), 2**64 - 1)

    def value(self, u: int, m: int, f: float) -> int:
        """m - M + #{j : U >= T_j(f)}; only the thresholds around the quantile of U need to be looked at."""
        with mpmath.workdps(80):
            centre = int(mpmath.floor(mpmath.sqrt(2) * self.s * mpmath.erfinv(mpmath.mpf(2 * u + 1) / 2**64 - 1) + f))
        low, high = (min(max(centre + self.M + by, 0), 2 * self.M + 1) for by in (-4, 4))
        return m - self.M + low + sum(u >= self.threshold(j, f) for j in range(low, high))

    def sample(self, x: FixedPoint, seed: bytes, purpose: str, copies: range) -> npt.NDArray[np.int64]:
        def digest(role: bytes) -> bytes:
            return hashlib.sha256(
                b"macer-serve exact-lattice/1\0" + purpose.encode() + b"\0" + role + b"\0" + seed
            ).digest()

        flat = [int(v) for v in x.reshape(-1)]
        d = len(flat)
        out = np.empty((len(copies), d), dtype=np.int64)
        key64 = int.from_bytes(digest(b"index")[:16], "little")
        low = digest(b"low")
        for row, copy in enumerate(copies):
            for i, xi in enumerate(flat):
                block = philox(copy * -(-d // 16) + i // 16, key64, 64)
                index = block[i % 16 // 4] >> (16 * (i % 4)) & 0xFFFF
                counter = (copy * d + i) | int.from_bytes(low[8:16], "little") << 64
                w = philox(counter, int.from_bytes(low[:8], "little"), 32)
                u = (index << 48) | (w[1] % 2**16) << 32 | w[0]
                m = (xi + STEP // 2) // STEP
                out[row, i] = self.value(u, m, float(Fraction(xi, STEP) - m))
        return out.reshape(len(copies), *x.shape)


@pytest.mark.parametrize("sigma", [0.01, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 3, 3), (4, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize("on_lattice", [True, False], ids=["lattice", "off-lattice"])
def test_the_stream_is_the_normative_one(sigma: float, shape: tuple[int, int, int], on_lattice: bool) -> None:
    x = lattice(0, 255, 1, 77, 128, shape=shape) if on_lattice else off_lattice(shape)
    slow, noise = Slow(sigma), ExactNoise(sigma)
    purposes: tuple[Purpose, ...] = ("selection", "estimation")
    for purpose in purposes:
        for copies in (range(4), range(70_000, 70_003), range(9_999_998, 10_000_000)):
            got = noise.sample(x, SEED, purpose, copies.start, copies.stop)
            assert got.dtype == np.int16
            np.testing.assert_array_equal(got, slow.sample(x, SEED, purpose, copies))


def exact_cdf(s: float, edges: list[Fraction]) -> list[mpmath.mpf]:
    return [mpmath.erfc(-mpmath.mpf(e.numerator) / e.denominator / s / mpmath.sqrt(2)) / 2 for e in edges]


@pytest.mark.parametrize("sigma", [0.005, 0.01, 0.12, 0.25])
def test_thresholds_are_exact_on_the_lattice(sigma: float) -> None:
    tables = lattice_tables(sigma)
    with mpmath.workdps(60):
        s = 255 * mpmath.mpf(sigma)
        for j, threshold in enumerate(tables.thresholds.tolist()):
            a = (j - tables.reach + mpmath.mpf(1) / 2) / s
            assert threshold == int(mpmath.floor(2**63 * mpmath.erfc(-a / mpmath.sqrt(2))))
    assert (np.diff(tables.thresholds.astype(object)) >= 0).all()


FRACTIONS = [0, 1, -1, 1000, -77_777, STEP // 4, STEP // 2 - 1, -STEP // 2]


def sampled_thresholds(noise: ExactNoise, f: float) -> npt.NDArray[np.uint64]:
    j = np.arange(len(noise.tables.thresholds))
    return noise._threshold(j, np.full(len(j), f)) if f else noise.tables.thresholds


@pytest.mark.parametrize("sigma", [0.005, 0.0123, 0.25, 1.0])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_tau_bounds_the_total_variation(sigma: float, fraction: int) -> None:
    """A coordinate's law as sampled, from the 64-bit thresholds, against the exact law: integers and 50 digits."""
    noise = ExactNoise(sigma)
    x = np.full((1, 1, 1), (100 << FRACTION_BITS) + fraction, dtype=np.int32)
    sampled = sampled_thresholds(noise, fraction / STEP).tolist()
    reach, f = noise.tables.reach, Fraction(fraction, STEP)
    with mpmath.workdps(50):
        exact = exact_cdf(255 * mpmath.mpf(sigma), [j - reach + Fraction(1, 2) - f for j in range(2 * reach + 1)])
        cdf = [mpmath.mpf(t) / 2**64 for t in sampled]
        cells = zip(np.diff([mpmath.mpf(0), *cdf, 1]), np.diff([mpmath.mpf(0), *exact, 1]), strict=True)
        distance = sum(abs(p - q) for p, q in cells) / 2
        # What the exact law has beyond the outermost values lies elsewhere in the sampled one.
        distance += sum(exact_cdf(255 * mpmath.mpf(sigma), [-reach - Fraction(1, 2) - f, f - reach - Fraction(3, 2)]))
        tau = noise.tau(x)
        assert distance <= tau
        assert tau < 1e-9
        # And threshold by threshold, as the bound was derived.
        error = tau / (len(sampled) + 2)
        assert max(abs(p - q) for p, q in zip(cdf, exact, strict=True)) <= error


def test_tau_adds_up_over_coordinates() -> None:
    noise = ExactNoise(0.25)
    one, many = (noise.tau(lattice(7, shape=shape)) for shape in [(1, 1, 1), (32, 32, 3)])
    assert many == pytest.approx(3072 * one)
    assert 1e-13 < many < 3e-13
    assert noise.tau(off_lattice((32, 32, 3))) > many
    assert GaussianNoise(0.25).tau(off_lattice((32, 32, 3))) == 0.0


@pytest.mark.parametrize("sigma", [0.005, 0.25, 1.0, 3.85, 3.9, 4.0])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_16_bit_short_cut_agrees_with_all_64_bits(sigma: float, fraction: int) -> None:
    """For every one of the 65,536 indices: where the bracket decides, both ends of the index mean that value."""
    noise = ExactNoise(sigma)
    thresholds = np.maximum.accumulate(sampled_thresholds(noise, fraction / STEP))
    index = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
    low, high = (
        np.searchsorted(thresholds, u, side="right") - noise.tables.reach
        for u in (index, index | np.uint64((1 << 48) - 1))
    )
    short_cut = (noise.tables.bracket.astype(np.int64) + fraction + STEP // 2) >> FRACTION_BITS
    decided = short_cut[:, 0] == short_cut[:, 1]
    assert (low[decided] == short_cut[decided, 0]).all()
    assert (high[decided] == short_cut[decided, 0]).all()
    assert not decided[[0, -1]].any()  # the tails are unbounded
    if sigma == 0.25:
        assert decided.mean() > 0.99
    if not fraction:
        decided = noise.tables.on_lattice != -32768
        assert (low[decided] == noise.tables.on_lattice[decided]).all()
        assert (high[decided] == noise.tables.on_lattice[decided]).all()
        assert (low[~decided] < high[~decided]).all()


def test_no_intermediate_leaves_int32() -> None:
    """The bracket's outermost bounds, with the largest fraction added, at the largest sigma."""
    bracket = lattice_tables(4.0).bracket.astype(np.int64)
    assert bracket.max() + STEP < 2**31
    assert bracket.min() - STEP >= -(2**31)
    assert np.abs(bracket[1:-1]).max() < bracket.max()  # only the infinite ends are cut


@pytest.mark.parametrize("sigma", [0.0, 0.004, 4.1, -0.25, float("nan"), float("inf")])
def test_sigma_outside_the_tables_is_refused(sigma: float) -> None:
    with pytest.raises(ParameterError, match="sigma"):
        ExactNoise(sigma)


# --- random access, keys --------------------------------------------------------------------------------------------

NOISES = [ExactNoise(0.25), GaussianNoise(0.25)]


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_range_is_a_slice_of_the_stream(noise: ExactNoise | GaussianNoise, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(3, 5, 3), (4, 4, 1), (1, 1, 3)]))
    x = off_lattice(shape) if data.draw(st.booleans()) else lattice(3, 200, shape=shape)
    whole = noise.sample(x, SEED, "estimation", 0, 60)
    start = data.draw(st.integers(0, 60))
    stop = data.draw(st.integers(start, 60))
    np.testing.assert_array_equal(noise.sample(x, SEED, "estimation", start, stop), whole[start:stop])


@pytest.mark.parametrize("on_lattice", [True, False])
def test_chunks_leave_no_trace(on_lattice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, shape = ExactNoise(0.25), (7, 5, 3)
    x = lattice(0, 9, 255, shape=shape) if on_lattice else off_lattice(shape)
    whole = noise.sample(x, SEED, "estimation", 0, 500)
    for chunk in (1, 105, 106, 1000):
        monkeypatch.setattr("macer_serve.smoothing.noise._CHUNK", chunk)
        np.testing.assert_array_equal(noise.sample(x, SEED, "estimation", 0, 500), whole)


def test_the_noise_is_the_same_whatever_pixel_it_meets() -> None:
    noise, shape = ExactNoise(0.25), (8, 8, 3)
    dark, bright = (noise.sample(lattice(v, shape=shape), SEED, "estimation", 0, 50).astype(int) for v in (0, 255))
    np.testing.assert_array_equal(bright - dark, np.full_like(dark, 255))
    assert dark.min() < -150  # nothing is clipped
    assert bright.max() > 400


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
@pytest.mark.parametrize("seed", [b"", b"short", bytes(15), bytes(17), bytes(32)])
def test_a_seed_has_128_bits(noise: ExactNoise | GaussianNoise, seed: bytes) -> None:
    with pytest.raises(ParameterError, match="128 bits"):
        noise.sample(lattice(0, shape=(2, 2, 1)), seed, "estimation", 0, 1)


def test_streams_by_name() -> None:
    for kind, name in zip(get_args(NoiseKind), ("exact-lattice/1", "gaussian/1"), strict=True):
        assert noise_for(kind, 0.25).name == name
    with pytest.raises(ParameterError, match="exact or gaussian"):
        noise_for("laplace", 0.25)  # type: ignore[arg-type]


def same_side(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_], share: float, tests: int = 1) -> None:
    """Two events of probability `share` agree as often as independent ones would: exact binomial test, two-sided."""
    agreements, p = int((a == b).sum()), share**2 + (1 - share) ** 2
    rate = FALSE_ALARM / (2 * tests)
    assert binom.isf(1 - rate, a.size, p) <= agreements <= binom.isf(rate, a.size, p)


def above(noise: ExactNoise | GaussianNoise, seed: bytes, purpose: Purpose, copies: int = 16) -> npt.NDArray[np.bool_]:
    """Where the noise of a 32 x 32 x 3 image is at least one lattice step."""
    z = noise.sample(lattice(0, shape=(32, 32, 3)), seed, purpose, 0, copies).reshape(copies, -1)
    return np.asarray(z >= (1 if isinstance(noise, ExactNoise) else 1 / 255))


def share_above(noise: ExactNoise | GaussianNoise) -> float:
    return float(ndtr(-(0.5 if isinstance(noise, ExactNoise) else 1.0) / (255 * noise.sigma)))


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
def test_all_128_bits_of_the_seed_matter(noise: ExactNoise | GaussianNoise) -> None:
    share, plain = share_above(noise), above(noise, SEED, "estimation")
    for bit in range(128):
        flipped = bytearray(SEED)
        flipped[bit // 8] ^= 1 << bit % 8
        same_side(plain, above(noise, bytes(flipped), "estimation"), share, tests=128)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
def test_purposes_copies_and_coordinates_are_independent(noise: ExactNoise | GaussianNoise) -> None:
    share = share_above(noise)
    estimation, selection = (above(noise, SEED, purpose, 200) for purpose in get_args(Purpose)[::-1])
    same_side(estimation, selection, share)
    for lag in (1, 2, 16, 100):  # copies
        same_side(estimation[lag:], estimation[:-lag], share, tests=4)
    lags = (1, 2, 3, 4, 15, 16, 17, 64, 96, 1536)  # neighbours, colours, blocks of the generator
    for lag in lags:
        same_side(estimation[:, lag:], estimation[:, :-lag], share, tests=len(lags))


def test_the_low_bits_are_independent_of_the_index_and_of_each_other() -> None:
    """At sigma = 4 half of the coordinates are decided by the low 48 bits; neighbours among them do not agree."""
    noise = ExactNoise(4.0)
    z = noise.sample(lattice(0, shape=(32, 32, 3)), SEED, "estimation", 0, 300).reshape(-1)
    odd = z % 2 == 1  # the last bit of a value: almost exactly 1/2
    for lag in (1, 2, 3, 16, 3072):
        same_side(odd[lag:], odd[:-lag], 0.5, tests=5)
    same_side(odd, z > 0, 0.5)


# --- the law --------------------------------------------------------------------------------------------------------


def chi_square(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    """The p-value; cells that expect fewer than 20 are joined with their neighbours."""
    starts = [0]
    for i in range(len(expected)):
        if expected[starts[-1] : i].sum() >= 20:
            starts.append(i)
    if expected[starts[-1] :].sum() < 20:
        starts.pop()
    k, e = np.add.reduceat(counts, starts), np.add.reduceat(expected, starts)
    return float(chi2.sf(((k - e) ** 2 / e).sum(), len(starts) - 1))


def law(sigma: float, f: float, reach: int) -> npt.NDArray[np.float64]:
    """P(Q(f + eps) = z), z = -reach .. reach."""
    edges = (np.arange(-reach, reach) + 0.5 - f) / (255 * sigma)
    return np.diff(np.concatenate([[0.0], ndtr(edges), [1.0]]))


def law_p_value(noise: ExactNoise, fraction: int, sigma: float | None = None, f: float | None = None) -> float:
    """How well 3e6 draws at 100 + fraction / 2^18 fit the exact law (of another sigma or fraction, where given)."""
    x = np.full((32, 32, 3), (100 << FRACTION_BITS) + fraction, dtype=np.int32)
    z = noise.sample(x, SEED, "estimation", 0, 1000).reshape(-1).astype(np.int64) - 100
    reach = int(9.1 * 255 * noise.sigma) + 3
    counts = np.bincount(z + reach, minlength=2 * reach + 1)
    exact = law(sigma or noise.sigma, fraction / STEP if f is None else f, reach)
    return chi_square(counts, z.size * exact)


@pytest.mark.parametrize("sigma", [0.005, 0.01, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("fraction", [0, 77_777, -STEP // 2, STEP // 2 - 1])
def test_values_follow_the_exact_law(sigma: float, fraction: int) -> None:
    assert law_p_value(ExactNoise(sigma), fraction) > FALSE_ALARM


def test_the_law_test_has_power() -> None:
    """A sigma wrong by one per cent, or a fraction wrong by a hundredth of a step at small sigma, would be seen."""
    assert law_p_value(ExactNoise(0.25), 0, sigma=0.25 * 1.01) < FALSE_ALARM
    assert law_p_value(ExactNoise(0.01), 77_777, f=77_777 / STEP + 0.01) < FALSE_ALARM
    assert law_p_value(ExactNoise(0.01), STEP // 4, f=0.0) < FALSE_ALARM


@pytest.mark.parametrize("fraction", [0, 77_777])
def test_the_tails_of_the_largest_sigma_are_there(fraction: int) -> None:
    """Beyond 4.17 sigma only the low bits decide: P = 2^-15 on both sides, of 3e6 draws; exact binomial test."""
    noise = ExactNoise(4.0)
    x = np.full((32, 32, 3), (100 << FRACTION_BITS) + fraction, dtype=np.int32)
    z = noise.sample(x, SEED, "estimation", 0, 1000).astype(int) - 100
    far = 4254
    p = float(ndtr((-far - 0.5 - fraction / STEP) / 1020) + ndtr((-far - 0.5 + fraction / STEP) / 1020))
    seen = int((np.abs(z) > far).sum())
    assert binom.isf(1 - FALSE_ALARM / 2, z.size, p) <= seen <= binom.isf(FALSE_ALARM / 2, z.size, p)


def test_the_gaussian_stream_is_gaussian() -> None:
    sigma = 0.25
    x = lattice(51, shape=(32, 32, 3))
    z = (GaussianNoise(sigma).sample(x, SEED, "estimation", 0, 200).reshape(-1).astype(np.float64) - 0.2) / sigma
    n = z.size
    assert abs(z.mean()) * n**0.5 < 5
    # Sum of squares: chi-square with n degrees of freedom, exactly.
    assert chi2.ppf(FALSE_ALARM / 2, n) < (z**2).sum() < chi2.isf(FALSE_ALARM / 2, n)
    assert kstest(z, "norm").pvalue > FALSE_ALARM
    assert kstest(z * 1.02, "norm").pvalue < FALSE_ALARM  # and it would notice


def test_the_slow_stream_counts_all_thresholds() -> None:
    """`Slow.value` looks at eight thresholds; here it is held to the full count."""
    slow = Slow(0.01)
    for f in (0.0, -0.5, 0.2967):
        thresholds = [slow.threshold(j, f) for j in range(2 * slow.M + 1)]
        assert thresholds == sorted(thresholds)
        for u in [0, 1, 2**64 - 1, *np.random.default_rng(0).integers(0, 2**63, 200).tolist(), thresholds[20]]:
            assert slow.value(u, 7, f) == 7 - slow.M + bisect_right(thresholds, u)
