"""Claim: exact noise follows Q(x + eps) exactly, on the lattice and off it.

Draws 1e9 coordinates for each sigma and each fractional part of x and compares the counts of every lattice
value with the exact law, Phi((z + 1/2 - x) / s) - Phi((z - 1/2 - x) / s), s = 255 sigma, by a chi-square test whose
cells expect at least 20 draws; further, neighbouring coordinates and neighbouring copies with independence, on a table
of at most 16 by 16 classes. Every p-value is uniform on (0, 1) if the claim holds: one below 1e-6 would refute it.

    python benchmarks/noise_law.py [--draws 1000000000]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from scipy.special import ndtr
from scipy.stats import chi2

from macer_serve.smoothing.noise import FRACTION_BITS, ExactNoise

SHAPE = (32, 32, 3)
COPIES = 2000  # a block, drawn at a time
SEED = bytes(range(16))


def law(s: float, f: float, reach: int) -> np.ndarray:
    """P(Q(f + eps) = z) for z = -reach .. reach, the tails beyond added to the ends; each side in its own tail."""
    edges = (np.arange(-reach, reach) + 0.5 - f) / s
    below, above = ndtr(edges), ndtr(-edges)
    inner = np.where(edges[1:] < 0, np.diff(below), -np.diff(above))
    return np.concatenate([below[:1], inner, above[-1:]])


def chi_square(counts: np.ndarray, expected: np.ndarray, least: float = 20.0) -> tuple[float, int]:
    """The p-value and degrees of freedom; cells that expect fewer than `least` are joined with their neighbours."""
    cells, seen, awaited = [], 0.0, 0.0
    for count, mean in zip(counts, expected, strict=True):
        seen, awaited = seen + count, awaited + mean
        if awaited >= least:
            cells.append((seen, awaited))
            seen = awaited = 0.0
    last_seen, last_awaited = cells.pop()
    cells.append((last_seen + seen, last_awaited + awaited))
    k, e = np.array(cells).T
    return float(chi2.sf(((k - e) ** 2 / e).sum(), len(cells) - 1)), len(cells) - 1


def independence(table: np.ndarray) -> float:
    """The p-value of the chi-square test of independence of rows and columns."""
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    degrees = (table.shape[0] - 1) * (table.shape[1] - 1)
    return float(chi2.sf(((table - expected) ** 2 / expected).sum(), degrees))


def measure(sigma: float, fraction: int, draws: int) -> None:
    """Draws at x = 100 + fraction / 2^18 lattice steps; prints one line."""
    noise, s = ExactNoise(sigma), 255.0 * sigma
    f = fraction / 2**FRACTION_BITS
    x = np.full(SHAPE, (100 << FRACTION_BITS) + fraction, dtype=np.int32)
    reach = int(9.1 * s) + 2
    exact = law(s, f, reach)
    # At most sixteen classes of about equal probability, by value.
    group = np.minimum(15, (16 * (np.cumsum(exact) - exact / 2)).astype(np.int64))
    counts = np.zeros(2 * reach + 1, dtype=np.int64)
    beside, next_copy = np.zeros((16, 16)), np.zeros((16, 16))
    started, drawn, first = time.perf_counter(), 0, 0
    while drawn < draws:
        z = (
            noise.sample(x, SEED, "estimation", first, first + COPIES).reshape(COPIES, -1).astype(np.int64)
            - 100
            + reach
        )
        counts += np.bincount(z.ravel(), minlength=2 * reach + 1)
        g = group[z]
        # Disjoint pairs: overlapping ones would not be independent of each other.
        beside += np.bincount((16 * g[:, 0::2] + g[:, 1::2]).ravel(), minlength=256).reshape(16, 16)
        next_copy += np.bincount((16 * g[0::2] + g[1::2]).ravel(), minlength=256).reshape(16, 16)
        drawn, first = drawn + z.size, first + COPIES
    p, degrees = chi_square(counts, drawn * exact)
    print(
        f"{sigma:<6g} {f:<10.6f} {drawn:>11,}  {p:<8.4f} {degrees:>6}  {independence(beside):<8.4f} "
        f"{independence(next_copy):<8.4f} {time.perf_counter() - started:6.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10**9)
    draws = parser.parse_args().draws
    print("sigma  x mod 1          draws  p(law)   cells-1 p(beside) p(copies) seconds")
    for sigma, fraction in [
        (0.25, 0),
        (0.25, 77_777),
        (0.01, 0),
        (0.01, -131_072),
        (1.0, 0),
        (1.0, 131_071),
        (4.0, 0),
        (4.0, -77_777),
    ]:
        measure(sigma, fraction, draws)


if __name__ == "__main__":
    main()
