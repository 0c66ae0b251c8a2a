"""Claim: which method gives the largest certified radii, from scratch, if all train equally long on a CPU.

    python benchmarks/equal_time.py --data-dir DIR --out RUNS [--minutes 10] [--seeds 0,1,2] [--every 50] [--n 1000]

Trains `resnet20-s2` on CIFAR-10 at sigma = 0.25 by each method with each seed. Each method has as many epochs as fit
into the minutes, at the speed that a run of one epoch on a tenth of the images shows first. All have one cycle of the
rate and an average of the weights. The same test images are certified with each network. The report has one row per
method, with errors between seeds; the lines below it compare the methods image by image, each image's radius being its
mean over the seeds, so that their errors are of the choice of images. All commands run here continue, so the same
command continues an interrupted benchmark. Run nothing else beside it: the speed is measured once per method.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
from methods import macer

from macer_serve.evaluation.logs import read_log

ARCH = ("--dataset", "cifar10", "--arch", "resnet20-s2", "--sigma", 0.25, "--held-out", 0, "--no-tensorboard")
CYCLE = "--recipe fast --schedule one-cycle --nesterov --weight-decay 5e-4 --ema 0.998"
# The options of `macer train` by method, beside the epochs. What is not named is of the recipe `fast`.
METHODS = {
    "gaussian": f"{CYCLE} --batch 256 --lr 0.2",
    "consistency": f"{CYCLE} --batch 128 --lr 0.1 --k 2 --lam 10",
    "smoothadv": f"{CYCLE} --batch 256 --lr 0.2 --k 1 --attack-steps 1 --epsilon 0.25 --ramp 0",
    "macer": f"{CYCLE} --batch 128 --lr 0.1 --k 4 --k-deferred 1",
}
PROBE, IMAGES = 5_000, 50_000


def epochs_within(minutes: float, method: str, data: tuple[object, ...], out: Path) -> int:
    """Returns how many epochs of a method take so many minutes, one at least. MACER's deferred epochs are cheaper."""
    costs = []
    for deferred in (0, 1) if method == "macer" else (0,):
        probe = out / "probes" / f"{method}-{deferred}"
        options = [*METHODS[method].split(), "--epochs", 2, "--limit", PROBE, "--out", probe]
        if method == "macer":
            options += ["--defer", 2 * deferred]
        macer("train", *ARCH, "--method", method, *options, *data)
        last = json.loads(probe.with_name(probe.name + ".run").joinpath("log.jsonl").read_text().splitlines()[-1])
        costs.append(last["seconds"] * IMAGES / last["images"])
    # A third of MACER's epochs is deferred in the recipe.
    seconds = costs[0] if len(costs) == 1 else costs[0] * 2 / 3 + costs[1] / 3
    return max(1, round(60 * minutes / seconds))


def radii(logs: list[Path]) -> dict[int, float]:
    """Returns each image's certified radius, 0 if it is wrong, as the mean over logs of the same images."""
    found: dict[int, list[float]] = {}
    for log in logs:
        for row in read_log(log).rows:
            found.setdefault(row.idx, []).append(row.radius * row.correct)
    return {idx: math.fsum(values) / len(values) for idx, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training per method and seed")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--n", type=int, default=1_000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further options of macer train, last")
    options = parser.parse_args()
    data, logs = ("--data-dir", options.data_dir, *options.train), {}
    for method in options.methods:
        epochs = epochs_within(options.minutes, method, data, options.out)
        chosen = ("--method", method, *METHODS[method].split(), "--epochs", epochs, "--seeds", options.seeds)
        macer("train", *ARCH, *chosen, "--out", options.out / method, *data)
    for method in options.methods:
        logs[method] = []
        for seed in options.seeds.split(","):
            log = options.out / method / f"seed-{seed}-n{options.n}.tsv"
            macer(
                "certify", options.out / method / f"seed-{seed}", "--dataset", "cifar10", "--data-dir",
                options.data_dir, "--every", options.every, "--n", options.n, "--out", log,
            )  # fmt: skip
            logs[method].append(log)
    macer("report", "--sweep", *(options.out / method for method in options.methods))
    macer("report", "--sweep", *(log for method in options.methods for log in logs[method]))
    for one, other in combinations(options.methods, 2):
        first, second = radii(logs[one]), radii(logs[other])
        differences = np.array([second[idx] - first[idx] for idx in first])
        error = differences.std(ddof=1) / math.sqrt(len(differences))
        print(f"{other} - {one}: {differences.mean():+.4f} +- {error:.4f} over {len(differences)} images")


if __name__ == "__main__":
    main()
