"""Claim: on MNIST the high rates of a cycle help Gaussian augmentation, and MACER gains less as the rate rises.

    python benchmarks/ablation.py --data-dir DIR --out RUNS [--every 20] [--n 10000] [--only NAME ...] [--train ...]

Trains LeNet at sigma = 0.25 for 30 epochs per variant, and certifies test images 10, 30, 50, ... Constants were chosen
by these images, so final figures are given on others. Prints one line per variant: hours of training, ACR, and the mean
difference of the certified radii to the first variant. The same command continues an interrupted benchmark.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from methods import difference, macer

from macer_serve.evaluation.logs import Log, read_log
from macer_serve.evaluation.reports.table3 import cost
from macer_serve.evaluation.summaries import summary

EPOCHS, FIRST = 30, 10
CYCLE = "--schedule one-cycle --nesterov --ema 0.998"
TWO_PARTS = "--method macer --k 4 --k-deferred 1 --defer 10"
# The options of `macer train` by variant, beside `--epochs`. All other constants are the published ones.
VARIANTS = {
    "gaussian-step-0.01": "--method gaussian",
    "gaussian-step-0.02": "--method gaussian --lr 0.02",
    "gaussian-cycle-0.05": f"--method gaussian --lr 0.05 {CYCLE}",
    "macer-step-0.01": TWO_PARTS,
    "macer-step-0.02": f"{TWO_PARTS} --lr 0.02",
    "macer-late-0.05": f"{TWO_PARTS} --defer 20 --lr 0.05 --milestones 15,20 --nesterov --ema 0.998",
    "macer-cycle-0.02": f"{TWO_PARTS} --lr 0.02 {CYCLE}",
    "macer-cycle-0.05-lam-4": f"{TWO_PARTS} --lr 0.05 {CYCLE} --lam 4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further options of macer train, last")
    options = parser.parse_args()
    data = ("--dataset", "mnist", "--data-dir", options.data_dir)
    logs: dict[str, Log] = {}
    print(f"{'variant':24} hours     ACR   difference to the first")
    for name in options.only:
        out, log = options.out / name, options.out / f"{name}-n{options.n}.tsv"
        how = (*VARIANTS[name].split(), "--epochs", EPOCHS, "--held-out", 0, "--out", out)
        macer("train", *data, *how, *options.train)
        macer("certify", out, *data, "--start", FIRST, "--every", options.every, "--n", options.n, "--out", log)
        logs[name] = read_log(log)
        first = next(iter(logs))
        beside = "" if name == first else difference(logs[first], logs[name])
        hours = cost(out, None, []).hours
        print(f"{name:24} {hours:5.2f}  {summary(logs[name]).acr:.4f}   {beside}", flush=True)


if __name__ == "__main__":
    main()
