"""Votes on copies that the noise kernel made, on the CPU, by Triton's interpreter: a program for subprocesses.

`TRITON_INTERPRET=1` must stand in the environment. Prints the names of the engines.
"""

from __future__ import annotations

import numpy as np
import torch
from cases import classifier_of, voter_of
from torch import nn

from macer_serve.errors import EngineError
from macer_serve.smoothing.noise import FRACTION_BITS, noise_for
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import Task
from macer_serve.voters.triton_noise import TritonCopies, require_the_stream

SHAPE, SIGMA, SEED, COPIES = (3, 19, 18), 0.25, bytes(range(16)), 6  # 1,026 coordinates: more than one program's


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 17 * 16, 5))


def votes_by(engine: str, x: np.ndarray) -> np.ndarray:
    options = {"engine": engine, "precision": "fp32", "batch": 32, "workers": 1, "compile": False}
    tasks = [Task(x, SEED, Draw(purpose, 3, 3 + COPIES // 2)) for purpose in ("selection", "estimation")]
    with voter_of(network(), input_shape=SHAPE, sigma=SIGMA, **options) as voter:
        print(voter.engine)
        return np.array(voter.submit(tasks).result())


def plain_votes(x: np.ndarray) -> np.ndarray:
    noise, plain = noise_for("exact", SIGMA), classifier_of(network(), SHAPE).module()
    votes = []
    for purpose in ("selection", "estimation"):
        copies = torch.from_numpy(noise.sample(x, SEED, purpose, 3, 3 + COPIES // 2))
        with torch.inference_mode():
            winners = plain(copies.permute(0, 3, 1, 2).float() * noise.scale).argmax(1)
        votes.append(np.bincount(winners.numpy(), minlength=5))
    return np.array(votes)


def main() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SHAPE[1], SHAPE[2], 3), dtype=np.int32)
    x = (pixels << FRACTION_BITS) + pixels * 777
    for engine in ("torch", "onnx"):
        np.testing.assert_array_equal(votes_by(engine, x), plain_votes(x))

    noise = noise_for("exact", SIGMA)
    damaged = TritonCopies(noise, (4, 4, 3), torch.device("cpu"))
    damaged.tables[2].add_(1)
    try:
        require_the_stream(damaged, noise, (4, 4, 3))
    except EngineError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
