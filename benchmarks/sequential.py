"""Claim: stopping when the question is answered takes tens of times fewer samples than a fixed 100,000.

    python benchmarks/sequential.py [--log LOG.tsv.gz] [--seeds 10]                     votes simulated from a log
    python benchmarks/sequential.py --checkpoint bundled:cifar10 --data-dir DATA --every 500       votes for real

*Simulated.* Every image of a published certification log (n = 100,000, alpha = 0.001; by default MACER's for CIFAR-10
at sigma = 0.25, under MACER_SHARED_DATA) becomes a coin. Its radius is that of some count k, by Clopper-Pearson: the
probability of its class is taken to be k / n, the log's own estimate. 24.6 % of the images were unanimous: theirs is 1.
An abstention tells only that k was small: its probability is taken to be 1/2 (`--abstained`), of all values up to there
the one that costs most. The selected class is the log's. "Certified" is the share of all images, whether classified
rightly or not, whose certificate has at least the radius asked for.

Whether and how a plan stops is a function of the look and the count there. It is tabulated from the package's own
`decided`, and every run is a path through the table; a sample of runs goes through `Certification` itself, and must
stop at the same look with the same radius. Mean samples are estimation votes (selection takes n0 = 100 more), given
with the standard error of the mean over seeds. The oracle, which knows p, needs ln(1 / alpha) / KL(p, Phi(r / sigma)).

*For real.* The same plans through `SmoothedClassifier`, on every K-th CIFAR-10 test image.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from macer_serve.evaluation.logs import ABSTAINED, read_log
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.bounds import bound_named
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.proof import prove
from macer_serve.smoothing.radius import one_sided_radius
from macer_serve.smoothing.stopping import decided
from macer_serve.smoothing.votes import Draw

LOG = Path(os.environ.get("MACER_SHARED_DATA", ".")) / "logs" / "cifar10_resnet110_macer_sigma0.25.tsv.gz"
ALPHA, N = 0.001, 100_000
RADII, TOLERANCES = (0.25, 0.5, 0.75), (0.1, 0.05)
PLANS = tuple(Plan(n=N, alpha=ALPHA, radius=r) for r in RADII)
PLANS += tuple(Plan(n=N, alpha=ALPHA, tolerance=t) for t in TOLERANCES)

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def name(plan: Plan) -> str:
    return f"{plan.kind} {plan.radius or plan.tolerance or f'{plan.n:,}'}"


def probabilities(log: Path, sigma: float, abstained: float) -> Floats:
    """The probability of each image's class, from the radius that its `N` votes proved."""

    def radius(k: int) -> float:
        return one_sided_radius(clopper_pearson_lower(k, N, ALPHA), sigma)

    def count(wanted: float) -> int:
        low, high = N // 2, N  # radius(low) < wanted <= radius(high), or high is the best there is
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if radius(middle) < wanted else (low, middle)
        return min((low, high), key=lambda k: abs(radius(k) - wanted))  # radii were printed to the nearest digit

    known: dict[float, float] = {}
    found = []
    for row in read_log(log).rows:
        if row.predict != ABSTAINED and row.radius not in known:
            known[row.radius] = count(row.radius) / N
        found.append(abstained if row.predict == ABSTAINED else known[row.radius])
    return np.array(found)


@dataclass(frozen=True, slots=True)
class Table:
    """`stops[look][k]`: whether the plan stops with k votes for the selected class at that look."""

    plan: Plan
    sigma: float
    looks: Counts
    stops: tuple[Flags, ...]

    @classmethod
    def of(cls, plan: Plan, sigma: float) -> Table:
        rule = _stops_by_radius if plan.kind == "radius" else _stops_by_tolerance
        stops = [rule(plan, sigma, m) for m in plan.looks[:-1]]
        return cls(plan, sigma, np.array(plan.looks), (*stops, np.ones(plan.n + 1, dtype=bool)))

    def walk(self, p: Floats, generator: np.random.Generator) -> tuple[Counts, Counts]:
        """Paths of counts at every look `[runs, looks]`, and at which of the looks each run stops `[runs]`."""
        paths = generator.binomial(np.diff(self.looks, prepend=0), p[:, None]).cumsum(axis=1)
        at = np.full(len(p), len(self.looks) - 1)
        running = np.arange(len(p))
        for i, stops in enumerate(self.stops):
            done = stops[paths[running, i]]
            at[running[done]] = i
            running = running[~done]
        return paths, at

    def radii(self, paths: Counts, at: Counts) -> Floats:
        """What each run has proved where it stopped."""
        pairs = np.stack([self.looks[at], paths[np.arange(len(at)), at]], axis=1)
        distinct, back = np.unique(pairs, axis=0, return_inverse=True)
        return np.array([proved(self.plan, m, k, self.sigma) for m, k in distinct.tolist()])[back.reshape(-1)]


def proved(plan: Plan, m: int, k: int, sigma: float) -> float:
    """The radius after m votes, k of them for the selected class."""
    return prove(plan, np.array([k, m - k]), 0, sigma=sigma, tau=0.0).radius


def _stops_by_radius(plan: Plan, sigma: float, m: int) -> Flags:
    """Evidence rises with k, for the radius and against it: hopeless below one count, certified from another on."""

    def reason(k: int) -> str | None:
        return decided(plan, np.array([k, m - k]), 0, proved(plan, m, k, sigma), sigma=sigma, limit=plan.n)

    def first(holds: dict[str | None, bool]) -> int:
        low, high = -1, m + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds[reason(middle)] else (middle, high)
        return high

    k = np.arange(m + 1)
    hopeless = first({"futility": False, None: True, "radius": True})
    certified = first({"futility": False, None: False, "radius": True})
    return (k < hopeless) | (k >= certified)


def _stops_by_tolerance(plan: Plan, sigma: float, m: int) -> Flags:
    """The plan stops where `attainable - proved <= tolerance`; both rise with k, which settles most k in blocks."""
    assert plan.tolerance is not None
    stops, ends = np.zeros(m + 1, dtype=bool), {}

    def end(k: int) -> tuple[float, float]:
        if k not in ends:
            bound = bound_named(plan.bound)
            attainable = bound.attainable(plan.budget, np.array([k, m - k]), 0, sigma=sigma, limit=plan.n)
            ends[k] = (attainable, proved(plan, m, k, sigma))
        return ends[k]

    blocks = [(0, m)]
    while blocks:
        low, high = blocks.pop()
        (least, worst), (most, best) = end(low), end(high)
        if most - worst <= plan.tolerance:
            stops[low : high + 1] = True
        elif least - best <= plan.tolerance:  # neither all nor none of them
            if high - low <= 1:
                stops[low], stops[high] = (e[0] - e[1] <= plan.tolerance for e in (end(low), end(high)))
            else:
                middle = (low + high) // 2
                blocks += [(low, middle), (middle, high)]
    return stops


def check(table: Table, p: Floats, generator: np.random.Generator) -> int:
    """How many runs of `Certification` were fed the votes of the table's paths, and ended as the table says."""
    paths, at = table.walk(p, generator)
    radii, plan = table.radii(paths, at), table.plan
    for path, stopped, radius in zip(paths, at.tolist(), radii.tolist(), strict=True):
        counts = dict(zip(table.looks.tolist(), path.tolist(), strict=True)) | {0: 0}
        run = Certification(plan, classes=2, sigma=table.sigma)
        while isinstance(want := run.wants(), Draw):
            k = counts[want.stop] - counts[want.start] if want.purpose == "estimation" else len(want)
            run.add(want, [k, len(want) - k])
        claim = run.claim()
        # An earlier look may have proved more than the look at which the run stopped.
        same = claim.n == table.looks[stopped] and claim.radius >= radius
        assert same, f"{plan}: {claim}, the table says otherwise"
    return len(p)


def oracle(p: Floats, q: float) -> float:
    """How many votes the likelihood ratio of the true p to q takes to reach 1 / alpha, at most N: the mean over images.

    Images below q count the same; a plan may beat that on them, since it gives them up at a weaker level than alpha.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(p > 0, p * np.log(p / q), 0.0)
        divergence += np.where(p < 1, (1 - p) * np.log((1 - p) / (1 - q)), 0.0)
        return float(np.minimum(math.log(1 / ALPHA) / divergence, N).mean())


def mean_se(values: list[float]) -> str:
    """The mean over seeds, and its standard error."""
    v = np.array(values)
    decimals = 0 if v.mean() > 100 else 2
    return f"{v.mean():,.{decimals}f} ± {v.std(ddof=1) / math.sqrt(len(v)):,.{decimals}f}"


def simulate(log: Path, sigma: float, abstained: float, seeds: int, checked: int) -> None:
    p = probabilities(log, sigma, abstained)
    print(f"{log.name}: {len(p):,} images, sigma {sigma}, {seeds} seeds, alpha {ALPHA}, n <= {N:,}\n")
    print("| plan | mean samples | median | oracle | fewer | certified, % | fixed, % | mean radius | fixed |")
    print("|---|---|---|---|---|---|---|---|---|")
    fixed, agreed = Plan(n=N, alpha=ALPHA), 0
    for plan in PLANS:
        table = Table.of(plan, sigma)
        means, medians, shares, fixed_shares, radii, fixed_radii = [], [], [], [], [], []
        for seed in range(seeds):
            generator = np.random.default_rng([seed, PLANS.index(plan)])
            paths, at = table.walk(p, generator)
            n = table.looks[at]
            means.append(float(n.mean()))
            medians.append(float(np.median(n)))
            radius = table.radii(paths, at)
            # Fixed, on the very votes that the run would have gone on to.
            counts, back = np.unique(paths[:, -1], return_inverse=True)
            longest = np.array([proved(fixed, N, k, sigma) for k in counts.tolist()])[back]
            radii.append(float(radius.mean()))
            fixed_radii.append(float(longest.mean()))
            if plan.radius is not None:
                shares.append(float(100 * (radius >= plan.radius).mean()))
                fixed_shares.append(float(100 * (longest >= plan.radius).mean()))
        generator = np.random.default_rng([seeds, PLANS.index(plan)])
        agreed += check(table, generator.choice(p, checked, replace=False), generator)
        cells = [name(plan), mean_se(means), f"{np.median(medians):,.0f}"]
        if plan.radius is not None:
            cells += [f"{oracle(p, float(ndtr(plan.radius / sigma))):,.0f}", f"{N / np.mean(means):.1f}x"]
            cells += [mean_se(shares), mean_se(fixed_shares), "", ""]
        else:
            lost = 100 * (np.mean(radii) / np.mean(fixed_radii) - 1)
            cells += ["", f"{N / np.mean(means):.1f}x", "", ""]
            cells += [f"{np.mean(radii):.4f} ({lost:+.1f} %)", f"{np.mean(fixed_radii):.4f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{agreed:,} runs of Certification on such votes stopped where the table says, with its radius.")


def images(data: Path, every: int) -> Iterator[npt.NDArray[np.uint8]]:
    from macer_serve.datasets import load_dataset

    test = load_dataset("cifar10", data, "test")
    for i in range(0, len(test), every):
        yield test[i][0]


def for_real(checkpoint: str, data: Path, every: int, n: int, workers: int | None) -> None:
    from macer_serve.smoothed import SmoothedClassifier
    from macer_serve.voters import VoterOptions

    seeds = EvaluationSeed.named("benchmarks/sequential.py")
    g = SmoothedClassifier.load(checkpoint, issuer=seeds, options=VoterOptions(workers=workers))
    assert g.voter is not None
    pictures = list(images(data, every))
    plans = (Plan(n=n, alpha=ALPHA), *(Plan(n=n, alpha=ALPHA, radius=r) for r in RADII))
    plans += tuple(Plan(n=n, alpha=ALPHA, tolerance=t) for t in TOLERANCES)
    print(f"{checkpoint}: every {every}th CIFAR-10 test image, {len(pictures)} in all, n <= {n:,}, {g.voter.engine}\n")
    print("| plan | mean samples | median | certified, % | fixed, % | mean radius | seconds an image |")
    print("|---|---|---|---|---|---|---|")
    longest = np.zeros(len(pictures))
    for plan in plans:
        began = time.perf_counter()
        certificates = [g.certify(picture, plan) for picture in pictures]
        seconds = (time.perf_counter() - began) / len(pictures)
        samples, radii = np.array([c.n for c in certificates]), np.array([c.radius for c in certificates])
        longest = radii if plan.kind == "fixed" else longest
        shares = [f"{100 * (r >= plan.radius).mean():.1f}" if plan.radius else "" for r in (radii, longest)]
        cells = [name(plan), f"{samples.mean():,.0f}", f"{np.median(samples):,.0f}", *shares]
        cells += ["" if plan.radius else f"{radii.mean():.4f}", f"{seconds:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--sigma", type=float, default=0.25, help="the log's")
    parser.add_argument("--abstained", type=float, default=0.5, help="the probability behind an abstention")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--checked", type=int, default=500, help="runs a plan that Certification itself must confirm")
    parser.add_argument("--checkpoint", help="a folder, or bundled:NAME: real votes instead")
    parser.add_argument("--data-dir", type=Path, help="where CIFAR-10 lies")
    parser.add_argument("--every", type=int, default=500, help="with --checkpoint: every K-th test image")
    parser.add_argument("--n", type=int, default=N, help="with --checkpoint: the plans' n")
    parser.add_argument("--workers", type=int, help="with --checkpoint: CPU cores; default all")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("a standard error needs two seeds")
    if options.checkpoint is None:
        simulate(options.log, options.sigma, options.abstained, options.seeds, options.checked)
    elif options.data_dir is None:
        parser.error("--checkpoint needs --data-dir")
    else:
        for_real(options.checkpoint, options.data_dir, options.every, options.n, options.workers)


if __name__ == "__main__":
    main()
