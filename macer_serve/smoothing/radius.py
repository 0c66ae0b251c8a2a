"""Certified L2 radii that follow from bounds on class probabilities, in pixel values in [0, 1]."""

from __future__ import annotations

import math
import sys

from scipy.special import ndtri

# Bounds of exactly 1 or 0 count as these: the radius stays finite, and is smaller.
_MOST, _LEAST = math.nextafter(1.0, 0.0), sys.float_info.min


def one_sided_radius(p_lower: float, sigma: float) -> float:
    """Returns the certified L2 radius sigma * Phi^-1(p_lower); 0 unless p_lower > 1/2.

    Cohen et al. 2019, Theorem 1 with p_B = 1 - p_A. Not yet rounded for display: see `round_down`.
    """
    return sigma * float(ndtri(min(p_lower, _MOST))) if p_lower > 0.5 else 0.0


def two_sided_radius(p_lower: float, p_upper: float, sigma: float) -> float:
    """Returns the radius sigma / 2 (Phi^-1(p_lower) - Phi^-1(p_upper)); 0 unless p_lower > p_upper.

    Cohen et al. 2019, Theorem 1. Not yet rounded for display: see `round_down`.
    """
    if p_lower <= p_upper:
        return 0.0
    return sigma / 2.0 * float(ndtri(min(p_lower, _MOST)) - ndtri(max(p_upper, _LEAST)))


def round_down(radius: float) -> float:
    """Returns the radius as it may be shown: less 1e-9 for floating-point error, then cut to 6 decimals."""
    return max(0.0, math.floor((radius - 1e-9) * 1e6) / 1e6)
