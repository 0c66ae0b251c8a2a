"""Claim: on one data-centre GPU the engine runs near the hardware's limit, and its noise is the specified stream.

    python benchmarks/gpu.py            # below 9 minutes on one GPU; no Ray, no network, no data set
    python benchmarks/gpu.py --tiny     # the same parts on a CPU, a test of this file: its figures mean nothing

Prints, one part after the other:

- noise: integers of the kernel against those of `smoothing/noise.py`, for five sigmas, on and off the lattice;
- votes: the bundled checkpoint's votes on this device in fp32 against the CPU's, on the same copies;
- engines: images per second of a plain eager loop (`randn -> add -> forward -> argmax -> bincount`), of the engine
  without noise and counting, and of the voter with both; the voter's share of the measured rate of matrix products;
  seconds per image at n = 100,000; peak memory. ResNet-110 at 32 x 32 and ResNet-50 at 224 x 224, in bf16 and fp32;
- training: seconds per epoch of each method by the training loop, published constants at sigma = 0.25, ResNet-110 on
  random images of CIFAR-10's shape; the second of two short epochs counts, since the first compiles.

A part for which no time is left says so. Networks have random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported; taken back after the part that needs it

import numpy as np
import torch
from torch import nn

from macer_serve.architectures import base_classifier
from macer_serve.base_classifier import BaseClassifier
from macer_serve.checkpoint import load_checkpoint
from macer_serve.datasets import ImageSet, dataset_info
from macer_serve.datasets.base import MemoryArrays
from macer_serve.smoothing.noise import FRACTION_BITS, ExactNoise, FixedPoint
from macer_serve.smoothing.votes import Draw, Purpose
from macer_serve.training.data import DeviceBatches
from macer_serve.training.loop import LoopOptions, train
from macer_serve.training.methods import METHODS
from macer_serve.training.precision import Precision
from macer_serve.training.recipes import recipe
from macer_serve.training.run_state import RunFolder
from macer_serve.voters import Task, VoterOptions, open_voter
from macer_serve.voters.batched import BatchedVoter
from macer_serve.voters.copies import device_copies

SIGMA, SEED, FAR = 0.25, bytes(range(16)), 9_999_997
MINUTES = 8.5
PURPOSES: tuple[Purpose, ...] = ("selection", "estimation")


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: on a GPU, or by `--tiny`."""

    networks: tuple[tuple[str, int, int], ...]  # architecture, side of its inputs, batch of the plain loop
    n: int  # votes per image
    seconds: float  # per rate
    product: int  # side of the matrices of the roofline
    sigmas: tuple[float, ...]
    noise: tuple[int, int]  # side of the input, copies
    votes: int  # compared with the CPU's
    training: str  # architecture
    steps: int  # per epoch
    options: dict[str, Any]  # of the recipes
    compiled: bool


FULL = Size(
    (("resnet110", 32, 500), ("torchvision:resnet50", 224, 128)),
    100_000, 3.0, 8192, (0.12, 0.25, 0.5, 1.0, 2.0), (32, 9), 10_000, "resnet110", 20, {}, True,
)  # fmt: skip
TINY = Size(
    (("resnet20", 32, 16),), 64, 0.05, 128, (0.25,), (4, 1), 64, "lenet", 2,
    {"batch": 4, "k": 2, "attack_steps": 1}, False,
)  # fmt: skip


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rate(work: Callable[[], int], seconds: float, device: torch.device) -> float:
    """Returns what `work` does per second, after one call that warms up."""
    work()
    synchronise(device)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        done += work()
    synchronise(device)
    return done / (time.perf_counter() - began)


def peak_mb(device: torch.device) -> float:
    """Returns the peak memory in MB: of the device since it was last asked, of the process on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def products(size: Size, device: torch.device) -> dict[str, float]:
    """Returns the measured operations per second of square matrix products, by precision: the roofline."""
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size.product, size.product, device=device, dtype=dtype) for _ in range(2))

        def work(a: torch.Tensor = a, b: torch.Tensor = b) -> int:
            for _ in range(8):
                torch.mm(a, b)
            return 8 * 2 * size.product**3

        found[name] = rate(work, size.seconds, device)
        print(f"matrix products {name}: {found[name] / 1e12:.2f} TFLOP/s", flush=True)
    return found


def noise(size: Size, device: torch.device) -> None:
    side, copies = size.noise
    shape, total, different = (side, side, 3), 0, 0
    off = np.random.default_rng(0).integers(0, 255 << FRACTION_BITS, shape, dtype=np.int32)
    for sigma in size.sigmas:
        stream = ExactNoise(sigma)
        kernel = device_copies(stream, shape, device.type)
        if kernel is None:
            print("noise: this device has no kernel for it, the host draws it; not compared")
            return
        for x in (off >> FRACTION_BITS << FRACTION_BITS, off):
            for purpose, start in ((p, s) for p in PURPOSES for s in (0, FAR)):
                rows = kernel.buffer(copies)
                kernel.fill(rows, x, SEED, purpose, start)
                specified = stream.sample(x, SEED, purpose, start, start + copies)
                different += int((rows.cpu().numpy() != specified).sum())
                total += specified.size
    print(f"noise: {total:,} coordinates, {different:,} differ from the specified stream", flush=True)


def image(side: int) -> FixedPoint:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.int32)
    return pixels << FRACTION_BITS


def votes_of(voter: BatchedVoter, x: FixedPoint, n: int) -> np.ndarray:
    """Returns n votes, with as many passes in flight as keep the workers busy."""
    waiting: deque[Any] = deque()
    total = np.zeros(voter.classes, dtype=np.int64)
    for piece in Draw("estimation", 0, n).cut(voter.batch_sizes[-1]):
        waiting.append(voter.submit([Task(x, SEED, piece)]))
        if len(waiting) > 2 * voter.workers:
            total += waiting.popleft().result()[0]
    for left in waiting:
        total += left.result()[0]
    return total


def options_of(size: Size, device: torch.device, precision: str) -> VoterOptions:
    return VoterOptions("torch", device.type, precision, workers=1, compile=size.compiled)  # type: ignore[arg-type]


def votes(size: Size, device: torch.device) -> None:
    classifier, x = load_checkpoint("bundled:cifar10")[1], image(32)
    counted = []
    for where in (device, torch.device("cpu")):
        with open_voter(classifier, sigma=SIGMA, options=options_of(size, where, "fp32")) as voter:
            counted.append(votes_of(voter, x, size.votes))
    moved = int(np.abs(counted[0] - counted[1]).sum()) // 2
    print(f"votes: of {size.votes:,} in fp32 at least {moved:,} are for another class than on the CPU", flush=True)


def network(arch: str, side: int) -> nn.Module:
    torch.manual_seed(0)
    classes = 1000 if side > 64 else 10
    return base_classifier(arch, classes=classes, input_shape=(3, side, side), mean=(0.5,) * 3, std=(0.25,) * 3).eval()


def plain_rate(module: nn.Module, side: int, batch: int, classes: int, size: Size, device: torch.device) -> float:
    """Returns the copies per second of the loop of research code, in fp32 without tf32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = module.to(device)
    pixels = torch.rand(1, 3, side, side, device=device)

    def work() -> int:
        with torch.no_grad():
            copies = pixels.repeat(batch, 1, 1, 1)
            winners = model(copies + torch.randn_like(copies) * SIGMA).argmax(1)
            return int(torch.bincount(winners, minlength=classes).sum())

    found = rate(work, size.seconds, device)
    module.to("cpu")
    return found


def operations(module: nn.Module, side: int) -> int:
    """Returns the floating-point operations of one image, two per multiplication and addition."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 3, side, side))
    return int(counter.get_total_flops())


def engine(arch: str, side: int, batch: int, precision: str, size: Size, device: torch.device, peak: float) -> None:
    module = network(arch, side)
    classes = 1000 if side > 64 else 10
    plain, flops = plain_rate(module, side, batch, classes, size, device), operations(module, side)
    peak_mb(device)
    classifier, x = BaseClassifier.of_module(module, input_shape=(3, side, side), classes=classes), image(side)
    with open_voter(classifier, sigma=SIGMA, options=options_of(size, device, precision)) as voter:
        bare = voter._source.buffer(voter.batch_sizes[-1])  # the engine alone, on copies that are there already

        def work() -> int:
            return len(voter._engine.logits(bare))

        alone = rate(work, size.seconds, device)
        votes_of(voter, x, 2 * voter.batch_sizes[-1])
        began = time.perf_counter()
        votes_of(voter, x, size.n)
        seconds = time.perf_counter() - began
        speed = size.n / seconds
        print(
            f"{arch} at {side}, {precision}: plain {plain:,.0f}/s, engine {alone:,.0f}/s, voter {speed:,.0f}/s "
            f"({speed / plain:.1f} x plain, {100 * flops * speed / peak:.0f} % of the roofline); "
            f"n = {size.n:,} in {seconds:.2f} s; peak {peak_mb(device):,.0f} MB; {voter.engine}",
            flush=True,
        )


def epoch(method: str, size: Size, device: torch.device) -> None:
    chosen = recipe("cifar10", method, SIGMA)
    fitting = {name: value for name, value in size.options.items() if hasattr(chosen, name)}
    chosen = chosen.with_options(**fitting, epochs=2, lr=0.001)
    count, info = chosen.batch * size.steps, dataset_info("mnist" if size.training == "lenet" else "cifar10")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, *info.input_shape[1:], info.input_shape[0]), dtype=np.uint8)
    images = ImageSet(info, MemoryArrays(pixels, generator.integers(0, 10, count)), tuple("0123456789"))
    torch.manual_seed(0)
    model = base_classifier(size.training, classes=10, input_shape=info.input_shape, mean=info.mean, std=info.std)
    precision = Precision.choose(device.type, "auto", "auto" if size.compiled else "off")
    precision.apply()
    peak_mb(device)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        batches = DeviceBatches(images, batch=chosen.batch, seed=0, device=device, limit=None)
        train(model, batches, chosen, seed=0, options=LoopOptions(precision), folder=run, identity={})
        speed = run.entries()[-1]["images_per_second"]
    print(
        f"training {method}, {size.training}, batch {chosen.batch}, {chosen.to_json().get('k', 1)} copies: "
        f"{50_000 / speed:,.1f} s per epoch of 50,000; peak {peak_mb(device):,.0f} MB; {precision.to_json()}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in seconds")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no part begins after this time")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny runs on a CPU")
    size, device = (TINY, torch.device("cpu")) if options.tiny else (FULL, torch.device("cuda"))
    ends = time.monotonic() + 60 * options.minutes
    where = "CPU" if options.tiny else torch.cuda.get_device_name()
    print(f"{where}; torch {torch.__version__}", flush=True)
    noise(size, device)
    os.environ.pop("TRITON_INTERPRET", None)
    peaks = products(size, device)
    parts: dict[str, Callable[[], None]] = {"votes against the CPU's": lambda: votes(size, device)}
    for precision in ("bf16", "fp32"):
        for arch, side, batch in size.networks:
            parts[f"{arch} in {precision}"] = lambda a=arch, s=side, b=batch, p=precision: engine(  # type: ignore[misc]
                a, s, b, p, size, device, peaks[p]
            )
    for method in METHODS:
        parts[f"training {method}"] = lambda m=method: epoch(m, size, device)  # type: ignore[misc]
    for name, part in parts.items():
        if time.monotonic() > ends:
            print(f"{name}: not measured, {options.minutes:g} minutes are over")
        else:
            part()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
