"""Checks of what a record says about the map from upload to model input, and of what follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from macer_serve.errors import ParameterError
from macer_serve.fit import Fit, fit_for, upload_radius
from macer_serve.images import MAX_PIXELS
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.noise import kind_of, noise_for
from macer_serve.verification.findings import Finding, agrees, fails, holds, shown, unchecked

MAX_SIDE = 2048  # of model inputs whose fit is computed again: larger ones take minutes


def examine_fit(c: Certificate) -> tuple[Fit | None, list[Finding]]:
    """Returns the map from upload to model input, built again from its sizes, and the findings about it."""
    try:
        size, crop = _sizes(c.fit["upload_size"], 2), _sizes(c.fit["crop"], 2)
        (resize, channels) = _sizes([c.fit["resize"], c.fit["channels"]], 2)
        if size[0] * size[1] > MAX_PIXELS or max(crop) > MAX_SIDE or resize > 16 * MAX_SIDE:
            return None, [unchecked("fit", f"sizes beyond {MAX_PIXELS:,} pixels, or {MAX_SIDE:,} of model input")]
        fit = fit_for((size[0], size[1]), resize, (crop[0], crop[1]), channels)
        norm = float(c.fit["norm"])
    except (ParameterError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        return None, [fails("fit", f"{shown(c.fit)} is no fit: {error}")]
    if abs(norm - fit.norm) <= 1e-12 * fit.norm:
        fit = replace(fit, norm=norm)
    if c.fit != fit.to_json():
        words = f"{shown(c.fit)} is recorded, {shown(fit.to_json())} follows from its sizes"
        return None, [fails("fit", words)]
    height, width = fit.upload_size
    return fit, [
        holds("fit", f"{height} x {width} to {fit.crop[0]} x {fit.crop[1]}, norm {norm:.6g}"),
        agrees("input.shape", c.input.get("shape"), [fit.channels, *fit.crop], "the fit"),
        agrees("input.upload_shape", c.input.get("upload_shape"), [height, width, 3], "the fit"),
    ]


def _sizes(value: Any, length: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != length or any(type(v) is not int or v < 1 for v in value):
        raise ParameterError(f"{shown(value)} are no sizes")
    return tuple(value)


def examine_through_fit(c: Certificate, radii: tuple[float, float], fit: Fit) -> list[Finding]:
    """Returns the findings about what depends on the fit: the radii at the upload, and tau.

    `radii` are those of the class and of the group at the model input.
    """
    dims = fit.channels * fit.crop[0] * fit.crop[1]
    found = [
        agrees(name, float(recorded), float(upload_radius(radius, fit, dims)), "radius and fit")
        for name, recorded, radius in zip(
            ("upload_radius", "group_upload_radius"), (c.upload_radius, c.group_upload_radius), radii, strict=True
        )
    ]
    if (kind := kind_of(c.noise)) is None:
        return found
    noise = noise_for(kind, c.sigma)
    on_lattice, off = (noise.tau(np.full(dims, bit, np.int32)) for bit in (0, 1))
    known = off if fit.resampled and c.tau == off else on_lattice
    found.append(agrees("tau", float(c.tau), known, "noise, sigma and input shape"))
    return found
