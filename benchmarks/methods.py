"""Claim: under one named budget MACER's certified radii exceed those of Gaussian augmentation.

    python benchmarks/methods.py --dataset mnist --data-dir DIR --out RUNS [--recipe fast] [--every 20] [--n 100000]

Trains every method by the recipe of that name, certifies the same test images with each, and prints Table 3. For each
pair of methods it also prints the mean difference of the certified radii over images (a wrong or abstained image counts
0), with its standard error. It runs `macer train` and `macer certify`, so the same command continues an interrupted
benchmark. With a GPU, the published recipes are

    --dataset mnist --recipe published                        (ACR 0.911 by Gaussian augmentation, 0.920 by MACER)
    --dataset cifar10 --recipe published --every 1            (Table 3; 0.424, 0.551, 0.531 on all images)
    --dataset cifar10 --recipe fast --methods macer --every 1 (ours)
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

from macer_serve.evaluation.logs import Log, read_log
from macer_serve.evaluation.reports import FORMATS
from macer_serve.evaluation.reports.table3 import PUBLISHED, cost, table
from macer_serve.evaluation.summaries import describe_images, summary

METHODS = ("gaussian", "consistency", "smoothadv", "macer")


def macer(*arguments: object) -> None:
    """Runs the command as a user would. A failure ends the benchmark with its message."""
    command = [str(Path(sys.executable).with_name("macer")), *map(str, arguments)]
    print("+ macer", *arguments, file=sys.stderr, flush=True)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def compare(logs: dict[str, Log]) -> None:
    """Prints the ACR of each method, and the difference of each pair over the images in both logs."""
    for method, log in logs.items():
        figures = summary(log)
        error = figures.acr_error or math.nan
        print(f"{method:10} ACR {figures.acr:.4f} +- {error:.4f}, abstained {100 * figures.abstained:.1f} %")
    for one, other in combinations(logs, 2):
        both = sorted({row.idx for row in logs[one].rows} & {row.idx for row in logs[other].rows})
        print(f"{other} - {one}: {difference(logs[one], logs[other])}, {describe_images(both)}")


def difference(one: Log, other: Log) -> str:
    """Returns the mean difference of the certified radii, other minus one, over the images in both logs."""
    radii = [{row.idx: row.radius * row.correct for row in log.rows} for log in (one, other)]
    differences = np.array([radii[1][idx] - radii[0][idx] for idx in radii[0].keys() & radii[1].keys()])
    if len(differences) < 2:
        return "too few images"
    if not differences.any():
        return "no difference"
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
    return f"{mean:+.4f} +- {error:.4f} ({mean / error:+.1f} standard errors)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further options of macer train, last")
    options = parser.parse_args()
    data = ("--dataset", options.dataset, "--data-dir", options.data_dir)
    logs, costs = {}, []
    for method in options.methods:
        out = options.out / method
        recipe = ("--method", method, "--recipe", options.recipe, "--sigma", options.sigma)
        macer("train", *data, *recipe, "--held-out", 0, "--out", out, *options.train)
    for method in options.methods:
        out, log = options.out / method, options.out / f"{method}-n{options.n}.tsv"
        macer("certify", out, *data, "--every", options.every, "--n", options.n, "--out", log)
        logs[method] = read_log(log)
        costs.append(cost(out, None, [logs[method]]))
    compare(logs)
    print()
    print(FORMATS["text"](table([*costs, *(row for row in PUBLISHED if row.data == options.dataset)])))


if __name__ == "__main__":
    main()
