"""Claims: two-sided certifies images on which one-sided abstains; betting certifies larger soft radii than Bernstein.

    python benchmarks/bounds.py --data-dir DIR [--abstained-in results/bundled/certify-every20-n10000.tsv]

On CIFAR-10 test images with the bundled checkpoint, alpha = 0.001. Hard votes: the same n = 10,000 votes of each image
under both bounds, of every 20th image, or of those alone on which a log says that one-sided abstained. Soft votes
(beta = 16): the same 1,000 and 10,000 votes under the betting mixture and under empirical Bernstein (Maurer & Pontil
2009), alpha halved between p_A and the runner-up by both.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from pathlib import Path

import numpy as np
from tqdm import tqdm

from macer_serve.datasets import load_dataset
from macer_serve.evaluation.logs import ABSTAINED, read_log
from macer_serve.smoothed import Question, SmoothedClassifier
from macer_serve.smoothing.binomial import empirical_bernstein_lower
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.radius import round_down, two_sided_radius
from macer_serve.smoothing.votes import SOFT_LEVELS, Draw, Votes, shares
from macer_serve.voters import Task

ALPHA, BETA = 0.001, 16.0


def votes_of(g: SmoothedClassifier, question: Question, draws: list[Draw]) -> list[Votes]:
    """The votes of each draw, the voter's workers side by side."""
    assert g.voter is not None
    pieces = [(i, piece) for i, draw in enumerate(draws) for piece in draw.cut(g.voter.batch_sizes[-1])]
    futures = [(i, g.voter.submit([Task(question.x, question.seed, piece)])) for i, piece in pieces]
    parts: list[list[Votes]] = [[] for _ in draws]
    for i, future in futures:
        parts[i] += future.result()
    return [np.sum(found, 0) for found in parts]


def bernstein_radius(votes: Votes, top: int, sigma: float) -> float:
    """The soft radius by empirical Bernstein, levels rounded down for the class and up for the others."""
    n = int(votes[0].sum())

    def lower(counts: Votes, z: np.ndarray) -> float:
        mean = float(counts @ z) / n
        variance = float(counts @ (z - mean) ** 2) / (n - 1)
        return empirical_bernstein_lower(mean, variance, n, ALPHA / 2)

    down = np.arange(SOFT_LEVELS) / SOFT_LEVELS
    p_lower = lower(votes[top], down)
    others = [1.0 - lower(votes[c], 1.0 - (down + 1.0 / SOFT_LEVELS)) for c in range(len(votes)) if c != top]
    return round_down(two_sided_radius(p_lower, max(others), sigma))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--abstained-in", type=Path, help="a log of macer certify, seed 0: only its abstentions")
    parser.add_argument("--soft-every", type=int, default=100)
    options = parser.parse_args()
    images = load_dataset("cifar10", options.data_dir, "test")
    g = SmoothedClassifier.load("bundled:cifar10", secret=hashlib.sha256(b"macer certify\0" + b"0").digest())
    sigma = g.config.sigma
    assert g.voter is not None
    print(g.voter.engine)

    plans = {bound: Plan(n=10_000, alpha=ALPHA, bound=bound) for bound in ("one-sided", "two-sided")}
    hard = [Draw("selection", 0, 100), Draw("estimation", 0, 10_000)]
    radii: dict[str, list[float]] = {bound: [] for bound in plans}
    gained = []
    indices = list(range(0, len(images), options.every))
    if options.abstained_in is not None:
        indices = [row.idx for row in read_log(options.abstained_in).rows if row.predict == ABSTAINED]
    for idx in tqdm(indices, unit="image"):
        question = g.question(images[idx][0])
        selection, votes = votes_of(g, question, hard)
        top, tau = int(selection.argmax()), g.noise.tau(question.x)
        proofs = {bound: prove(plan, votes, top, sigma=sigma, tau=tau) for bound, plan in plans.items()}
        for bound, proof in proofs.items():
            radii[bound].append(proof.radius)
        if proofs["one-sided"].class_id is None and proofs["two-sided"].class_id is not None:
            gained.append((idx, images[idx][1], top, proofs["two-sided"].radius, np.sort(votes)[:-4:-1].tolist()))
    for bound, found in radii.items():
        print(
            f"{bound:10} certifies {sum(r > 0 for r in found)} of {len(found)} images, mean radius {np.mean(found):.4f}"
        )
    print(f"certified by two-sided alone: {len(gained)}", flush=True)
    for idx, label, top, radius, most in gained[:10]:
        print(f"  image {idx}: label {label}, certified {top}, radius {radius:.6f}, top votes {most}")

    found: dict[tuple[str, int], list[float]] = {}
    for idx in tqdm(range(0, len(images), options.soft_every), unit="image"):
        question = g.question(images[idx][0])
        draws = [Draw("selection", 0, 100, BETA), Draw("estimation", 0, 1000, BETA)]
        selection, few, more = votes_of(g, question, [*draws, Draw("estimation", 1000, 10_000, BETA)])
        top, tau = int(shares(selection).argmax()), g.noise.tau(question.x)
        for votes in (few, few + more):
            n = int(votes[0].sum())
            plan = Plan(n=n, alpha=ALPHA, bound="soft", beta=BETA)
            found.setdefault(("betting", n), []).append(prove(plan, votes, top, sigma=sigma, tau=tau).radius)
            found.setdefault(("empirical Bernstein", n), []).append(bernstein_radius(votes, top, sigma))
    for (bound, n), values in sorted(found.items(), key=lambda entry: entry[0][1]):
        print(f"soft, n = {n:6}: {bound:20} mean radius {statistics.mean(values):.4f} over {len(values)} images")


if __name__ == "__main__":
    main()
