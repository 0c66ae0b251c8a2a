"""Compares the noise kernel with the specified stream, on the CPU, by Triton's interpreter: a program for subprocesses.

`TRITON_INTERPRET=1` must stand in the environment. Prints the number of coordinates compared and of those that differ.
"""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
import torch

from macer_serve.smoothing.noise import FRACTION_BITS, ExactNoise
from macer_serve.smoothing.votes import Purpose
from macer_serve.voters.triton_noise import TritonCopies

SIGMAS = (0.12, 0.25, 0.5, 1.0, 2.0)
PURPOSES: tuple[Purpose, ...] = ("selection", "estimation")
FAR = 9_999_997
CORNERS = (0, 1, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, (1 << 18) - 1)  # of a lattice step


def compared(shape: tuple[int, int, int], copies: int, blocks: int, every: int) -> tuple[int, int]:
    """Returns how many coordinates were compared, and how many of them differ.

    Unless `every` pair of purpose and first copy is compared, two pairs are.
    """
    pairs = list(product(PURPOSES, (0, FAR))) if every else list(zip(PURPOSES, (0, FAR), strict=True))
    seed, total, different = bytes(range(16)), 0, 0
    off = np.random.default_rng(0).integers(0, 255 << FRACTION_BITS, shape, dtype=np.int32)
    off.reshape(-1)[: len(CORNERS)] = [(100 << FRACTION_BITS) + corner for corner in CORNERS]
    inputs = {"lattice": off >> FRACTION_BITS << FRACTION_BITS, "off-lattice": off}
    for sigma in SIGMAS:
        noise = ExactNoise(sigma)
        kernel = TritonCopies(noise, shape, torch.device("cpu"), blocks)
        for kind, x in inputs.items():
            wrong = 0
            for purpose, start in pairs:
                rows = kernel.buffer(copies)
                kernel.fill(rows, x, seed, purpose, start)
                specified = noise.sample(x, seed, purpose, start, start + copies)
                wrong += int((rows.numpy() != specified).sum())
                total += specified.size
            different += wrong
            print(f"sigma {sigma:<5g} {kind:12} {wrong} differ", flush=True)
    return total, different


if __name__ == "__main__":
    height, width, channels, copies, blocks, every = (int(value) for value in sys.argv[1:])
    print("{:,} coordinates, {:,} differ".format(*compared((height, width, channels), copies, blocks, every)))
