"""Statements about data sets are true as often as they say: simulated audits with known truth, exact tests.

Each test of 1,000 audits raises a false alarm with probability below 1e-6. The images that are not good are as bad as
possible: their true radius lies just below r, so that the fixed plan gives them false certificates with a probability
as near alpha as its votes allow.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from macer_serve.errors import ParameterError
from macer_serve.evaluation.statements import good_images, good_in_population, good_share
from macer_serve.smoothing.binomial import clopper_pearson_lower

AUDITS, ALPHA, DELTA, IMAGES, VOTES = 1000, 0.01, 0.01, 500, 1000
EDGE = float(norm.cdf(0.25 / 0.25))  # the top class's probability at which the true radius is exactly r
NEEDED = next(k for k in range(VOTES + 1) if k and clopper_pearson_lower(k, VOTES, ALPHA) >= EDGE)
MOST_FALSE = int(binom.isf(1e-6, AUDITS, DELTA))


def counted(rng: np.random.Generator, good: int, bad: int) -> int:
    """Returns how many rows count: the good images have votes to spare, the bad ones lie just below the edge."""
    return int((rng.binomial(VOTES, 0.99, good) >= NEEDED).sum() + (rng.binomial(VOTES, EDGE, bad) >= NEEDED).sum())


def holds(false: int) -> bool:
    return false <= MOST_FALSE


def test_the_adversary_comes_near_alpha() -> None:
    assert 0.8 * ALPHA < binom.sf(NEEDED - 1, VOTES, EDGE) <= ALPHA


def test_the_example_of_ten_thousand_images() -> None:
    assert good_images(7500, 10_000, 0.001, 0.01) == 7493
    assert 0.7395 <= good_share(7500, 10_000, 0.001, 0.01) < 0.7396


@pytest.mark.parametrize("good", [0, 100, 400, 490])
def test_of_these_images(good: int) -> None:
    rng = np.random.default_rng(good)
    counts = [counted(rng, good, IMAGES - good) for _ in range(AUDITS)]
    bounds = [good_images(k, IMAGES, ALPHA, DELTA) for k in counts]
    slack = float(np.median([good - bound for bound in bounds]))
    print(f"of these, {good} good: false {sum(b > good for b in bounds)}, median slack {slack}")
    assert holds(sum(bound > good for bound in bounds))
    assert slack <= 0.02 * IMAGES
    assert not holds(sum(k > good for k in counts)), "K in place of K - m must be caught"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.75, 0.98])
def test_of_a_population(share: float) -> None:
    rng = np.random.default_rng(int(100 * share) + 1)
    goods = rng.binomial(IMAGES, share, AUDITS)
    bounds = [good_share(counted(rng, int(g), IMAGES - int(g)), IMAGES, ALPHA, DELTA) for g in goods]
    slack = float(np.median(share - np.array(bounds)))
    print(f"of a population, share {share}: median slack {slack:.4f}")
    assert holds(sum(bound > share for bound in bounds))
    assert slack <= 0.06


@pytest.mark.parametrize("population", [500, 600, 5000])
def test_of_a_finite_population(population: int) -> None:
    rng = np.random.default_rng(population)
    truth = population * 3 // 4
    goods = rng.hypergeometric(truth, population - truth, IMAGES, AUDITS)
    bounds = [
        good_in_population(counted(rng, int(g), IMAGES - int(g)), IMAGES, population, ALPHA, DELTA) for g in goods
    ]
    slack = float(np.median(truth - np.array(bounds)))
    print(f"of {population}: median slack {slack}")
    assert holds(sum(bound > truth for bound in bounds))
    assert slack <= 0.08 * population


def test_duplicates_that_are_counted_are_caught() -> None:
    rng = np.random.default_rng(7)  # 20 images, all just below the edge, 100 rows each with the same noise
    counts = [100 * counted(rng, 0, 20) for _ in range(AUDITS)]
    assert not holds(sum(good_images(k, 2000, ALPHA, DELTA) > 0 for k in counts))


@pytest.mark.parametrize(("n", "alpha", "delta"), [(1, 0.1, 0.05), (7, 0.3, 0.2), (40, 0.001, 0.01)])
def test_every_bound_is_the_first_that_is_not_rejected(n: int, alpha: float, delta: float) -> None:
    for k in range(n + 1):
        possible = [m for m in range(k + 1) if binom.sf(m - 1, n - k + m, alpha) > delta]
        assert good_images(k, n, alpha, delta) == k - max(possible)


def test_values_out_of_range_are_refused() -> None:
    for wrong in [(-1, 10, 0.1, 0.1), (11, 10, 0.1, 0.1), (0, 0, 0.1, 0.1), (1, 10, 0.0, 0.1), (1, 10, 0.1, 0.5)]:
        with pytest.raises(ParameterError):
            good_images(*wrong)
    with pytest.raises(ParameterError):
        good_in_population(5, 10, 9, 0.1, 0.1)
