"""Claim: on a CPU with VNNI and no AMX the default engine computes at least 1.8 times the votes of torch's bf16.

With AMX the claim does not hold: there torch's compiled bf16 is itself several times faster (results/engines.md).

    python benchmarks/engine.py [--arch bundled:cifar10 resnet20 resnet110] [--seconds 5] [--rounds 5]

Contenders, each in a process of its own, in alternating rounds on the same cores; the median round counts:

- plain: eager fp32 on all cores, `randn -> add -> forward -> argmax -> bincount` at batch 500, as in research code;
- torch (compiled bf16), onnx fp32, onnx int8, openvino int8: voters of this project, exact noise included;
- art: IBM's Adversarial Robustness Toolbox, `PyTorchRandomizedSmoothing.certify` at n = 10,000, if it is installed.

An architecture other than a checkpoint has random weights, quantised on random images. Peak memory is the process's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from macer_serve.base_classifier import BaseClassifier
from macer_serve.checkpoint import load_checkpoint
from macer_serve.hardware import usable_cores

SHAPE, SIGMA, SEED, ART_N = (3, 32, 32), 0.25, bytes(16), 10_000
VOTERS = {
    "torch": {"engine": "torch"},
    "onnx fp32": {"engine": "onnx", "precision": "fp32"},
    "onnx int8": {"engine": "onnx", "precision": "int8"},
    "openvino int8": {"engine": "openvino", "precision": "int8"},
}
Round = Callable[[float], float]  # seconds -> votes per second


def classifier_of(arch: str, int8: Path | None) -> BaseClassifier:
    """Returns the checkpoint's base classifier, or the named architecture with random weights and an int8 file."""
    if arch.startswith("bundled:"):
        return load_checkpoint(arch)[1]
    import torch

    from macer_serve.architectures import base_classifier

    torch.manual_seed(0)
    module = base_classifier(arch, classes=10, input_shape=SHAPE, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    classifier = BaseClassifier(SHAPE, 10, load_module=lambda: module)
    return classifier if int8 is None else replace(classifier, int8=int8.read_bytes())


def write_int8(arch: str, path: Path) -> None:
    """Quantises an architecture with random weights on random images under noise."""
    from macer_serve.checkpoint.quantize import quantize_graph

    generator = np.random.default_rng(0)
    images = generator.random((256, *SHAPE)) + SIGMA * generator.standard_normal((256, *SHAPE))
    path.write_bytes(quantize_graph(classifier_of(arch, None).graph(), images.astype(np.float32)))


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.int32)


def plain(classifier: BaseClassifier) -> tuple[str, Round]:
    import torch

    model = classifier.module()
    image = torch.from_numpy(pixels().transpose(2, 0, 1).astype(np.float32) / 255)[None]

    def run(seconds: float) -> float:
        torch.set_num_threads(usable_cores())
        votes, began = torch.zeros(10, dtype=torch.int64), time.perf_counter()
        with torch.no_grad():
            while time.perf_counter() - began < seconds:
                batch = image.repeat(500, 1, 1, 1)
                winners = model(batch + torch.randn_like(batch) * SIGMA).argmax(1)
                votes += torch.bincount(winners, minlength=10)
        return int(votes.sum()) / (time.perf_counter() - began)

    return "eager fp32", run


def art(classifier: BaseClassifier) -> tuple[str, Round]:
    import torch
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    model = classifier.module()
    smoothed = PyTorchRandomizedSmoothing(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=SHAPE,
        nb_classes=10,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),  # it moves its weights to the model's device only then
        sample_size=100,
        scale=SIGMA,
        alpha=0.001,
        device_type="cpu",
    )
    image = pixels().transpose(2, 0, 1)[None].astype(np.float32) / 255

    def run(seconds: float) -> float:
        torch.set_num_threads(usable_cores())
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                smoothed.certify(image, n=ART_N, batch_size=500)
            done += ART_N + 100
        return done / (time.perf_counter() - began)

    return "certify, n = 10,000", run


def ours(classifier: BaseClassifier, name: str) -> tuple[str, Round]:
    from macer_serve.smoothing.votes import Draw
    from macer_serve.voters import Task, VoterOptions, open_voter

    voter = open_voter(classifier, sigma=SIGMA, options=VoterOptions(device="cpu", **VOTERS[name]))  # type: ignore[arg-type]
    x, batch = pixels() << 18, voter.batch_sizes[-1]

    def run(seconds: float) -> float:
        counted, at, began = 0, 0, time.perf_counter()
        waiting: deque[object] = deque()
        while time.perf_counter() - began < seconds:
            while len(waiting) < 2 * voter.workers:
                waiting.append(voter.submit([Task(x, SEED, Draw("estimation", at, at + batch))]))
                at += batch
            counted += int(waiting.popleft().result()[0].sum())  # type: ignore[attr-defined]
        for left in waiting:
            counted += int(left.result()[0].sum())  # type: ignore[attr-defined]
        return counted / (time.perf_counter() - began)

    return voter.engine, run


def contend(arch: str, name: str, int8: Path | None) -> None:
    """A contender's process: for each line of standard input, one round of so many seconds."""
    classifier = classifier_of(arch, int8)
    began = time.perf_counter()
    engine, run = {"plain": plain, "art": art}.get(name, lambda c: ours(c, name))(classifier)
    run(0.5)
    print(json.dumps({"engine": engine, "warm_up": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        rate = run(float(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"rate": rate, "peak": peak}), flush=True)


@contextlib.contextmanager
def contender(arch: str, name: str, int8: Path | None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, "--contender", name, "--arch", arch]
    process = subprocess.Popen(
        [*command, *(["--int8", str(int8)] if int8 else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # who waits for a turn must not spin
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answer(process: subprocess.Popen[str]) -> dict[str, object] | None:
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def machine() -> str:
    """Returns the CPU's name and what it multiplies, as benchmarks print it beside their figures."""
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name"))
        known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
        flags = ", ".join(flag for flag in known if f" {flag}" in info)
    return f"{name}, {usable_cores()} cores ({flags})"


def compare(arch: str, names: list[str], seconds: float, rounds: int) -> None:
    with contextlib.ExitStack() as stack:
        int8 = None
        if not arch.startswith("bundled:"):
            int8 = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "int8.onnx"
            # In a process of its own: a child's peak memory begins with its parent's.
            subprocess.run([sys.executable, __file__, "--quantise", "--arch", arch, "--int8", str(int8)], check=True)
        running = {}
        for name in names:
            process = stack.enter_context(contender(arch, name, int8))
            if (ready := answer(process)) is None:
                print(f"{arch}: {name} cannot run here", flush=True)
            else:
                running[name] = (process, ready)
        rates: dict[str, list[float]] = {name: [] for name in running}
        peaks: dict[str, float] = {}
        for _ in range(rounds):
            for name, (process, _) in running.items():
                assert process.stdin is not None
                print(seconds, file=process.stdin, flush=True)
                if (measured := answer(process)) is None:
                    raise SystemExit(f"{name} ended")
                rates[name].append(float(measured["rate"]))  # type: ignore[arg-type]
                peaks[name] = float(measured["peak"])  # type: ignore[arg-type]
        medians = {name: statistics.median(found) for name, found in rates.items()}
        print(f"\n{arch}: {rounds} rounds of {seconds:g} s")
        print(f"{'':14} {'votes/s':>8} {'/ plain':>8} {'/ torch':>8} {'peak MB':>8} {'warm-up s':>9}  engine")
        for name, rate in medians.items():
            against = [f"{rate / medians[base]:8.2f}" if base in medians else f"{'':8}" for base in ("plain", "torch")]
            at_start = running[name][1]
            figures = f"{rate:8.0f} {' '.join(against)} {peaks[name]:8.0f} {at_start['warm_up']:9.1f}"
            print(f"{name:14} {figures}  {at_start['engine']}")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["bundled:cifar10", "resnet20", "resnet110"])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["plain", *VOTERS, "art"], default=["plain", *VOTERS, "art"])
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--int8", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quantise", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(options.arch[0], options.contender, options.int8)
        return
    if options.quantise:
        write_int8(options.arch[0], options.int8)
        return
    print(machine(), flush=True)
    for arch in options.arch:
        compare(arch, options.only, options.seconds, options.rounds)


if __name__ == "__main__":
    main()
