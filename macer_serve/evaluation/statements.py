"""Bounds behind statements about a data set, from K of N images that are correct and certified at a radius r.

An image is *good* if the smoothed classifier gives its label at every point closer than r. The row of an image that is
not good counts with probability at most alpha, because only a false certificate makes the row count. The noise of
distinct model inputs is independent. Model, labels, r and N are fixed before the noise is drawn. All bounds err on the
safe side in floating point.
"""

from __future__ import annotations

from scipy.stats import binom, hypergeom

from macer_serve.errors import ParameterError
from macer_serve.smoothing.binomial import check_alpha, clopper_pearson_lower

# The tails of scipy are trusted to this share of themselves.
TAIL_ERROR = 1e-9


def good_images(certified: int, images: int, alpha: float, delta: float) -> int:
    """Returns a lower bound of the number of good images among these images. It is false with probability <= delta.

    If only K - m of N images are good, N - K + m are not, and at least m of them count: an event of probability at most
    P(Bin(N - K + m, alpha) >= m). One more image adds at most one to the binomial count, so this probability falls as m
    rises. The bound is K - m for the largest m whose probability exceeds delta. Nothing is assumed about the choice of
    the images. Raises `ParameterError` unless 0 <= K <= N, N >= 1 and alpha and delta lie in (0, 0.5).
    """
    _check(certified, images, alpha, delta)
    low, high = 0, certified + 1  # m = 0 is always possible; more than K false rows are not
    while high - low > 1:
        m = (low + high) // 2
        if float(binom.sf(m - 1, images - certified + m, alpha)) * (1.0 + TAIL_ERROR) > delta:
            low = m
        else:
            high = m
    return certified - low


def good_share(certified: int, images: int, alpha: float, delta: float) -> float:
    """Returns a lower bound of the share of good images in the population. It is false with probability <= delta.

    The images were drawn independently. If the share is a, a row counts with probability at most a + (1 - a) alpha. The
    Clopper-Pearson limit q bounds this probability, so a >= (q - alpha) / (1 - alpha). Raises as `good_images`.
    """
    _check(certified, images, alpha, delta)
    q = clopper_pearson_lower(certified, images, delta)
    return max(0.0, (q - alpha) / (1.0 - alpha) - 1e-15)


def good_in_population(certified: int, images: int, population: int, alpha: float, delta: float) -> int:
    """Returns a lower bound of the number of good images in a finite population. It is false with probability <= delta.

    The images were drawn without replacement. Half of delta pays for t, the bound of the good images in the sample. The
    other half pays for the draw: the bound is the smallest A with P(Hypergeometric(population, A, images) >= t) >
    delta / 2. Raises as `good_images`, and for a population smaller than the sample.
    """
    if population < images:
        raise ParameterError(f"a population of {population:,} cannot hold a sample of {images:,} images")
    good = good_images(certified, images, alpha, delta / 2.0)
    if good == 0:
        return 0
    low, high = good - 1, population - (images - good)  # fewer than t are impossible; the sample's own share is not
    while high - low > 1:
        a = (low + high) // 2
        if float(hypergeom.sf(good - 1, population, a, images)) * (1.0 + TAIL_ERROR) > delta / 2.0:
            high = a
        else:
            low = a
    return high


def _check(certified: int, images: int, alpha: float, delta: float) -> None:
    check_alpha(alpha)
    if not 0.0 < delta < 0.5:
        raise ParameterError(f"the confidence must lie strictly between 0.5 and 1, so delta cannot be {delta}")
    if images < 1 or not 0 <= certified <= images:
        raise ParameterError(f"{certified} of {images} images cannot be certified")
