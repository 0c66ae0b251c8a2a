#!/usr/bin/env python3
"""Coarse answers turn most abstentions into certified groups: 500 CIFAR-10 test images, 1,024 votes each.

    python benchmarks/coarse.py --data-dir DATA > results/coarse.md

The bundled checkpoint certifies every 20th test image, once, under its hierarchy (animal / vehicle). The same votes are
also evaluated as if there were no hierarchy. "Right" means that the group contains the image's label.
"""

import argparse
from pathlib import Path

import numpy as np

from macer_serve.datasets import load_dataset
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove

RADIUS = 0.25


def main() -> None:
    """Certify the images and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--n", type=int, default=1024)
    options = parser.parse_args()
    images = load_dataset("cifar10", options.data_dir, "test")
    g = SmoothedClassifier.load("bundled:cifar10", issuer=EvaluationSeed.named("0"))
    hierarchy, voter = g.config.hierarchy, g.voter
    assert hierarchy is not None
    assert voter is not None
    plan, plain = g.policy_plan(Plan(n=options.n)), Plan(n=options.n)
    total = fine = coarse = right_coarse = fine_at = coarse_at = plain_abstained = plain_at = 0
    acr = plain_acr = 0.0
    for idx in range(0, len(images), options.every):
        pixels, label = images[idx]
        c = g.certify(pixels, plan)
        total += 1
        if c.class_id is not None:
            fine, right = fine + 1, c.class_id == label
            fine_at, acr = fine_at + (right and c.radius >= RADIUS), acr + right * c.radius
        elif c.group is not None:
            members = dict(hierarchy.levels[c.level - 1])[c.group]
            coarse, right = coarse + 1, label in members
            right_coarse, coarse_at = right_coarse + right, coarse_at + (right and c.group_radius >= RADIUS)
        proof = prove(plain, np.array(c.votes), c.selected, sigma=c.sigma, tau=c.tau)
        plain_abstained += proof.class_id is None
        plain_at += proof.class_id == label and proof.radius >= RADIUS
        plain_acr += proof.radius if proof.class_id == label else 0.0
    share = lambda k: f"{100 * k / total:.1f} %"  # noqa: E731
    print("# Coarse answers of the bundled checkpoint\n")
    print(f"Printed by `benchmarks/coarse.py`: {total} CIFAR-10 test images")
    print(f"(every {options.every}th), {options.n:,} votes, alpha {plan.alpha:g}, one-sided bound, fixed plan, engine")
    print(f"`{voter.engine}`.\n")
    print("| | classes only | with coarse answers |\n|---|---|---|")
    print(f"| nothing certified | {share(plain_abstained)} | {share(total - fine - coarse)} |")
    print(f"| a class certified | {share(total - plain_abstained)} | {share(fine)} |")
    print(f"| a group certified instead | | {share(coarse)} ({right_coarse} of {coarse} right) |")
    print(f"| class right, radius {RADIUS:g} or more | {share(plain_at)} | {share(fine_at)} |")
    print(f"| class or group right, radius {RADIUS:g} or more | {share(plain_at)} | {share(fine_at + coarse_at)} |")
    print(f"| ACR of classes | {plain_acr / total:.4f} | {acr / total:.4f} |")


if __name__ == "__main__":
    main()
