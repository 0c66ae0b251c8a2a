"""Claim: `radius=r` decides as a fixed plan of n = 100,000 votes would, at a hundredth of its cost.

    python benchmarks/agreement.py CHECKPOINT --data-dir DIR --out LOG.tsv [--radius 0.25] [--every 20]

Both plans read the same votes, those of one stream of noise an image. The plan `radius` runs to its end; then the
stream is read on until it is settled whether the fixed plan, on its 100,000 votes, certifies the radius: either all of
them were counted, or the chance that the rest of them reverses the answer is below 2 * `CHANCE`. (p lies within its
anytime-valid bounds but for a chance of `CHANCE`; the rest is then Bin(n - m, p), whose tail must be below `CHANCE`,
too.) Few images need more than some thousand votes for that, so the claim is checked on hundreds of images where
running the fixed plan takes hours. An interrupted log is continued.

The two may differ: `radius` gives an image up at a futility level of 5 %, and Clopper-Pearson is given all of alpha.
Differences must lie within 5 standard errors of Phi(r / sigma), apart from a share of refuted images within that level.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr
from scipy.stats import binom
from tqdm import tqdm

from macer_serve.datasets import load_dataset
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing import mixture
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import VOTE_LEVELS, Draw
from macer_serve.voters import Task, Voter, VoterOptions

N, ALPHA, CHANCE = 100_000, 0.001, 1e-6
COLUMNS = ("idx", "radius_plan", "radius_n", "fixed_plan", "counted", "k", "engine")


def least_votes(p: float, n: int = N, alpha: float = ALPHA) -> int:
    """The fewest of n votes with which Clopper-Pearson bounds the probability by p from below."""
    low, high = 0, n
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if clopper_pearson_lower(middle, n, alpha) >= p else (middle + 1, high)
    return low


def settled(k: int, m: int, needed: int) -> bool | None:
    """Whether the fixed plan certifies, after k of m votes; None while its other votes may still decide that."""
    if k >= needed or k + (N - m) < needed:
        return k >= needed
    counts = np.array([m - k, k])
    low = mixture.probability_below(mixture.lower(counts, VOTE_LEVELS, CHANCE, N))
    if binom.cdf(needed - k - 1, N - m, low) < CHANCE:
        return True
    high = mixture.probability_above(mixture.upper(counts, VOTE_LEVELS, CHANCE, N))
    return False if binom.sf(needed - k - 1, N - m, high) < CHANCE else None


def fixed_plan(
    g: SmoothedClassifier, voter: Voter, pixels: Any, so_far: Certificate, needed: int
) -> tuple[bool, int, int]:
    """Whether the fixed plan certifies, and the votes (m, k for the class) that settle it; `so_far`'s come first."""
    model_input, top, m = g.model_input(pixels), so_far.selected, so_far.n
    seed = g.seed_proof(model_input, Plan.from_json(so_far.plan)).seed
    k = so_far.votes_by_class()[top]
    while (answer := settled(k, m, needed)) is None:
        # Seldom enough that judging costs little, often enough that little is drawn beyond the answer.
        step = voter.batch_sizes[-1]
        more = min(N - m, step * voter.workers * max(1, m // (16 * voter.workers * step)))
        draws = Draw("estimation", m, m + more).cut(step)
        waiting = [voter.submit([Task(model_input.x, seed, draw)]) for draw in draws]
        k += sum(int(future.result()[0][top]) for future in waiting)
        m += more
    return answer, m, k


def judge(rows: list[dict[str, str]], p: float) -> None:
    """Print what the log says of the claim."""
    n = np.array([int(row["radius_n"]) for row in rows])
    band = 5.0 * math.sqrt(p * (1.0 - p) / N)
    print(f"{len(rows)} images, engines {', '.join(sorted({row['engine'] for row in rows}))}")
    print(f"radius plan: {n.mean():,.0f} +- {n.std(ddof=1) / math.sqrt(len(n)):,.0f} votes, median {np.median(n):,.0f}")
    counts = {
        (mine, fixed): sum((row["radius_plan"], row["fixed_plan"]) == (mine, fixed) for row in rows)
        for mine in ("certified", "refuted", "undecided")
        for fixed in ("certified", "refuted")
    }
    for (mine, fixed), count in counts.items():
        print(f"  {mine:9} by radius, {fixed:9} by fixed: {count}")
    differ = [r for r in rows if r["radius_plan"] != "undecided" and r["radius_plan"] != r["fixed_plan"]]
    for row in differ:
        share = int(row["k"]) / int(row["counted"])
        inside = abs(share - p) <= band
        print(
            f"  image {row['idx']}: k/n = {share:.5f} of {row['counted']}, {'inside' if inside else 'OUTSIDE'} the band"
        )
    print(
        f"band: |k/n - {p:.5f}| <= {band:.5f}; {sum(int(r['counted']) == N for r in rows)} images took all {N:,} votes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data-dir", type=Path, required=True, help="where CIFAR-10 lies")
    parser.add_argument("--out", type=Path, required=True, help="the log, continued where it exists")
    parser.add_argument("--radius", type=float, default=0.25)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--workers", type=int, help="CPU cores; default all")
    options = parser.parse_args()
    seeds = EvaluationSeed.named("benchmarks/agreement.py")
    g = SmoothedClassifier.load(options.checkpoint, issuer=seeds, options=VoterOptions(workers=options.workers))
    voter = g.voter
    assert voter is not None
    images = load_dataset("cifar10", options.data_dir, "test")
    p = float(ndtr(options.radius / g.config.sigma))
    needed = least_votes(p)
    rows: list[dict[str, str]] = []
    if options.out.exists():
        with options.out.open(newline="") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t"))
    done = {int(row["idx"]) for row in rows}
    with options.out.open("a", newline="") as handle:
        log = csv.DictWriter(handle, COLUMNS, delimiter="\t", lineterminator="\n")
        if not rows:
            log.writeheader()
        for idx in tqdm([i for i in range(0, len(images), options.every) if i not in done], file=sys.stderr):
            pixels, _ = images[idx]
            certificate = g.certify(pixels, Plan(n=N, alpha=ALPHA, radius=options.radius))
            mine = {"radius": "certified", "futility": "refuted"}.get(str(certificate.stopped), "undecided")
            if mine == "undecided" and certificate.radius >= options.radius:
                mine = "certified"
            fixed, counted, k = fixed_plan(g, voter, pixels, certificate, needed)
            values = (idx, mine, certificate.n, "certified" if fixed else "refuted", counted, k, voter.engine)
            row = dict(zip(COLUMNS, map(str, values), strict=True))
            log.writerow(row)
            handle.flush()
            rows.append(row)
    judge(rows, p)


if __name__ == "__main__":
    main()
