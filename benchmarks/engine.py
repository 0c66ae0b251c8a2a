"""Claim: TorchVoter computes several times the votes a second of the plain loop that research code runs.

    python benchmarks/engine.py [--arch resnet20 ...] [--seconds 10]

Baseline, in the same run on the same machine with all cores: eager fp32,
`randn -> add -> forward -> argmax -> bincount` at batch 500. Ratios depend on the hardware's bf16 arithmetic; the
engine's name is printed with them. The voter's votes include its exact noise. Rounds of the two alternate, and each
figure is the median of three.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from macer_serve.voters.torch_voter import TorchVoter

from macer_serve.architectures import base_classifier
from macer_serve.hardware import usable_cores
from macer_serve.smoothing.certification import Draw
from macer_serve.voters import Task

SHAPE, SIGMA, SEED = (3, 32, 32), 0.25, bytes(16)


def plain(model: torch.nn.Module, image: torch.Tensor, seconds: float) -> float:
    """Votes a second of the plain loop."""
    torch.set_num_threads(usable_cores())
    votes, began = torch.zeros(10, dtype=torch.int64), time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - began < seconds:
            batch = image.repeat(500, 1, 1, 1)
            winners = model(batch + torch.randn_like(batch) * SIGMA).argmax(1)
            votes += torch.bincount(winners, minlength=10)
    return int(votes.sum()) / (time.perf_counter() - began)


def ours(voter: TorchVoter, x: np.ndarray, seconds: float) -> float:
    """Votes a second of the voter, every worker kept busy."""
    torch.set_num_threads(1)
    counted, at, began = 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        waiting = []
        for _ in range(4 * voter.workers):
            waiting.append(voter.submit([Task(x, SEED, Draw("estimation", at, at + voter.step))]))
            at += voter.step
        counted += sum(int(future.result()[0].sum()) for future in waiting)
    return counted / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet20-s2", "resnet20", "resnet110"])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--batch", type=int, default=None)
    options = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.int32)
    image = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)[None]
    for arch in options.arch:
        torch.manual_seed(0)
        model = base_classifier(arch, classes=10, input_shape=SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
        began = time.perf_counter()
        with TorchVoter(model, input_shape=SHAPE, sigma=SIGMA, batch=options.batch) as voter:
            warm_up = time.perf_counter() - began
            rounds = [
                (plain(model, image, options.seconds), ours(voter, pixels << 18, options.seconds)) for _ in range(3)
            ]
            baseline, fast = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(
                f"{arch:16} plain {baseline:8.0f} votes/s   {voter.engine} {fast:8.0f} votes/s   "
                f"ratio {fast / baseline:5.2f}   warm-up {warm_up:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
