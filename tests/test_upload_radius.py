"""The radius of the upload against a truth in closed form: linear classifiers of resized uploads.

On the model input, f = [w.z >= c] smoothed by N(0, sigma^2) has p_A = Phi(R* / sigma), R* = |w.x - c| / ||w||. At
the upload, x = A_h u A_w^T, the boundary lies at the distance |w.x - c| / ||A_h^T w A_w||: the bound R* / (||A_h||
||A_w||) is reached where w is the outer product of the top singular vectors, and nearly so where it is constant. So
`upload_radius` is caught where it is too large by a thousandth, and where it gives away more than 1 %.
"""

from __future__ import annotations

import math
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import voter_of
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from torch import Tensor, nn

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.fit import FRACTION_BITS, Fit, fit_for, upload_radius
from macer_serve.images import decode
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.radius import one_sided_radius, round_down

SIGMA = 0.25
ATTEMPTS = 200
ROUNDING = 0.5 / 2**FRACTION_BITS / 255  # of a coordinate of x, in pixel values
Floats = NDArray[np.float64]
Bytes8 = NDArray[np.uint8]

# (upload, resize, crop): enlarged, reduced, odd, portrait and landscape, almost the model's own size, a thin stripe
SIZES = {
    "up": ((20, 20), 32, (32, 32)),
    "up, odd, portrait": ((23, 17), 32, (32, 32)),
    "down, landscape": ((48, 64), 32, (32, 32)),
    "down, odd, landscape": ((37, 53), 32, (32, 32)),
    "down, odd, portrait, cropped": ((167, 107), 36, (32, 32)),
    "far down": ((160, 160), 16, (16, 16)),
    "up across, portrait": ((64, 31), 40, (37, 40)),
    "by one pixel": ((31, 32), 32, (32, 32)),
    "a stripe": ((7, 90), 16, (16, 16)),
}


@dataclass(frozen=True, slots=True)
class Line:
    """The smoothed linear classifier [w.x >= c]. `w` and x are `[H, W, channels]`, x in pixel values in [0, 1]."""

    fit: Fit
    w: Floats
    c: float

    @classmethod
    def at(cls, fit: Fit, w: Floats, u: Bytes8, margin: float) -> Line:
        """The classifier whose boundary lies `margin` from the model input of u, on the side that its sign says."""
        w = w / np.linalg.norm(w)
        return cls(fit, w, float((w * stored(fit, u)).sum()) - margin)

    def margins(self, uploads: Floats) -> Floats:
        """The signed distances of x = A_h u A_w^T from the boundary. `uploads` `[k, h, w, 3]`, any real numbers."""
        (top, bottom), (left, right) = self.fit.rows.source, self.fit.columns.source
        A_h, A_w = self.fit.rows.dense(), self.fit.columns.dense()
        rows = np.tensordot(A_h, uploads[:, top:bottom, left:right], axes=(1, 1))
        x = np.tensordot(rows, A_w, axes=(2, 1)).transpose(1, 0, 3, 2)
        if self.fit.channels == 1:
            x = x.mean(axis=3, keepdims=True)
        return np.tensordot(x, self.w, axes=3) - self.c

    def gradient(self) -> Floats:
        """The direction at the upload, A_h^T w A_w `[h, w, 3]`: its norm is the slope of the margin."""
        A_h, A_w = self.fit.rows.dense(), self.fit.columns.dense()
        w = np.repeat(self.w / 3, 3, axis=2) if self.fit.channels == 1 else self.w
        gradient = np.zeros((*self.fit.upload_size, 3))
        (top, bottom), (left, right) = self.fit.rows.source, self.fit.columns.source
        gradient[top:bottom, left:right] = np.einsum("ih,ijc,jw->hwc", A_h, w, A_w, optimize=True)
        return gradient

    def upload_distance(self, u: Bytes8) -> float:
        """The distance of u, before any rounding of x, from the smoothed boundary."""
        return abs(float(self.margins(u[None] / 255)[0])) / float(np.linalg.norm(self.gradient()))


def stored(fit: Fit, u: Bytes8) -> Floats:
    """The model input that is certified, in pixel values in [0, 1]: `[H, W, channels]`."""
    return fit.apply(u) / (255 * 2.0**FRACTION_BITS)


def top_singular(fit: Fit) -> Floats:
    vectors = (np.linalg.svd(axis.dense())[0][:, 0] for axis in (fit.rows, fit.columns))
    return np.repeat(np.outer(*vectors)[:, :, None], fit.channels, axis=2)


def constant(fit: Fit) -> Floats:
    """One weight a channel, so that every coordinate's rounding counts in full."""
    return np.broadcast_to([1.0, -0.5, 0.25][: fit.channels], (*fit.crop, fit.channels)).copy()


def exact_radius(margin: float) -> float:
    """What a certificate would say of an input `margin` from the boundary, were p_A known exactly."""
    return round_down(one_sided_radius(float(ndtr(abs(margin) / SIGMA)), SIGMA))


def pixels(size: tuple[int, int], seed: int) -> Bytes8:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


# --- exact p ----------------------------------------------------------------------------------------------------------


def check_ratio(fit: Fit, u: Bytes8, weights: Callable[[Fit], Floats], margin: float, *, factor: float = 1.0) -> float:
    """The reported radius, times `factor`, over the true distance: never above 1."""
    line = Line.at(fit, weights(fit), u, margin)
    ratio = factor * upload_radius(exact_radius(margin), fit, line.w.size) / line.upload_distance(u)
    assert ratio <= 1.0
    return ratio


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", SIZES)
def test_the_radius_is_below_the_true_distance_and_within_one_per_cent_of_it(name: str, channels: int) -> None:
    fit = fit_for(*SIZES[name], channels)
    for seed, margin in enumerate((0.05, -0.05, 0.25, -0.5, 0.95)):
        u = pixels(fit.upload_size, seed)
        assert check_ratio(fit, u, top_singular, margin) >= 0.99
        assert check_ratio(fit, u, constant, margin) >= 0.97  # close to the norm, all but for the edges


def directions(line: Line, generator: np.random.Generator) -> Iterator[Floats]:
    """Unit changes of the upload: noise of every kind, and what an attacker would try."""
    gradient = line.gradient()
    shape = gradient.shape
    for i in range(ATTEMPTS):
        direction = (
            lambda: generator.standard_normal(shape),
            lambda: generator.standard_normal(shape) * (generator.random(shape) < 0.02) + 1e-9,
            lambda: np.broadcast_to(generator.standard_normal(3), shape),
            lambda: np.sign(gradient) * generator.random(shape),
            lambda: gradient + np.abs(gradient).max() * generator.standard_normal(shape) * 10.0 ** -(i % 7),  # noqa: B023
        )[i % 5]()
        yield direction / np.linalg.norm(direction) * generator.choice([-1, 1])
    yield gradient / np.linalg.norm(gradient)
    yield -gradient / np.linalg.norm(gradient)


def flips(line: Line, u: Bytes8, length: float, seed: int) -> int:
    """How many changes of that length leave the class of u, x being rounded for the worst at either end."""
    generator = np.random.default_rng(seed)
    side = math.copysign(1.0, float(line.margins(u[None] / 255)[0]))
    worst = ROUNDING * float(np.abs(line.w).sum())
    count = 0
    for direction in directions(line, generator):
        (margin,) = line.margins((u / 255 + length * direction)[None])
        count += side * float(margin) - worst <= 0.0
    return count


@pytest.mark.parametrize("weights", [top_singular, constant])
@pytest.mark.parametrize("name", SIZES)
def test_no_change_within_the_radius_flips_the_class_and_one_just_outside_does(
    name: str, weights: Callable[[Fit], Floats]
) -> None:
    fit = fit_for(*SIZES[name])
    for seed, margin in enumerate((0.02, -0.4)):
        u = pixels(fit.upload_size, seed)
        line = Line.at(fit, weights(fit), u, margin)
        certified = upload_radius(exact_radius(margin), fit, line.w.size)
        assert flips(line, u, certified * (1 - 1e-9), seed) == 0
        assert flips(line, u, certified * (1.01 if weights is top_singular else 1.03), seed) >= 1


def test_the_allowance_for_rounding_is_needed() -> None:
    """A change that reaches the radius without it crosses the boundary by rounding alone, x's and its neighbour's."""
    fit = fit_for((375, 500), 256, (224, 224))
    u = pixels(fit.upload_size, 0)
    line = Line.at(fit, top_singular(fit), u, 0.02)
    worst = 2 * ROUNDING * float(np.abs(line.w).sum())
    direction = line.gradient() / np.linalg.norm(line.gradient())
    radius = exact_radius(0.02)
    for length, crosses in ((radius / fit.norm, True), (upload_radius(radius, fit, line.w.size), False)):
        (margin,) = line.margins((u / 255 - length * direction)[None])
        assert (float(margin) < worst) == crosses


def test_a_radius_too_large_by_a_thousandth_is_noticed() -> None:
    for size in SIZES.values():
        fit = fit_for(*size)
        with pytest.raises(AssertionError):
            check_ratio(fit, pixels(fit.upload_size, 0), top_singular, 0.25, factor=1.001)


# --- photographs ------------------------------------------------------------------------------------------------------


def photographs(number: int) -> list[Bytes8]:
    """Decoded photographs of many sizes, or a skip."""
    data, shared = os.environ.get("MACER_DATA_DIR"), os.environ.get("MACER_SHARED_DATA")
    files = sorted(Path(data, "photos").rglob("*.JPEG")) if data else []
    if files:
        return [decode(file.read_bytes()) for file in files[:: max(1, len(files) // number)][:number]]
    archive = Path(shared, "imagenet_samples.tar") if shared else None
    if archive is None or not archive.is_file():
        pytest.skip("needs photographs: MACER_DATA_DIR/photos or MACER_SHARED_DATA/imagenet_samples.tar")
    found = []
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".JPEG")]
        for member in members[:: max(1, len(members) // number)][:number]:
            file = tar.extractfile(member)
            assert file is not None
            found.append(decode(file.read()))
    return found


def test_photographs() -> None:
    tried = photographs(12)
    assert len({photo.shape for photo in tried}) > 1
    for i, u in enumerate(tried):
        for resize, crop in ((256, (224, 224)), (32, (32, 32))):
            fit = fit_for((u.shape[0], u.shape[1]), resize, crop)
            assert check_ratio(fit, u, top_singular, 0.5) >= 0.99
            assert check_ratio(fit, u, constant, -0.2) >= 0.97
            if i == 0 and resize == 32:
                line = Line.at(fit, top_singular(fit), u, 0.25)
                certified = upload_radius(exact_radius(0.25), fit, line.w.size)
                assert flips(line, u, certified * (1 - 1e-9), i) == 0
                assert flips(line, u, certified * 1.01, i) >= 1


# --- votes ------------------------------------------------------------------------------------------------------------

# The real thing: a network in integers, exact noise off the lattice, votes, certificates. On the stored x the boundary
# lies at w.z = t - 1/2, as in tests/test_soundness.py. A certificate is false where its class is wrong, or where the
# true distance of the upload is smaller than its `upload_radius`.
PLAN = Plan(n0=50, n=400, alpha=0.05)
FALSE_ALARM = 1e-6
SMALL = {"up": ((5, 6), 8, (8, 8)), "down": ((19, 13), 8, (8, 8)), "cropped": ((9, 21), 10, (8, 8))}


class Threshold(nn.Module):
    """[w.z >= t] of the lattice integers z = 255 x, every partial sum in fp32 a multiple of 1/2 below 2^23."""

    def __init__(self, weights: NDArray[np.int64], t: int) -> None:
        super().__init__()
        w = torch.from_numpy(weights.transpose(2, 0, 1).reshape(1, -1).copy()).float()
        self.fc = nn.Linear(w.shape[1], 2)
        self.fc.load_state_dict({"weight": torch.cat([0 * w, w]), "bias": torch.tensor([0.0, 0.5 - float(t)])})

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.round(x * 255.0).flatten(1))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Voted:
    """A classifier whose weights are as near as integers come to the top singular vectors of one fit."""

    line: Line
    classifier: SmoothedClassifier

    def upload(self, radius: float, side: int, generator: np.random.Generator) -> Bytes8:
        """A random upload whose true distance is just below `radius`."""
        gradient = self.line.gradient()
        slope = float(np.linalg.norm(gradient))
        wanted = side * radius * (1 - 1e-7) * slope
        while True:
            u = generator.integers(60, 196, gradient.shape).astype(float)
            for _ in range(4):
                u += np.rint((wanted - self.line.margins(u[None] / 255)[0]) * 255 * gradient / slope**2)
            for _ in range(8):  # pixel by pixel, ever nearer
                left = float(wanted - self.line.margins(u[None] / 255)[0]) * 255
                steps = np.stack([gradient, -gradient])
                by = np.unravel_index(np.abs(left - steps).argmin(), steps.shape)
                if abs(left - steps[by]) < abs(left):
                    u[by[1:]] += (1, -1)[int(by[0])]
            distance = side * float(self.line.margins(u[None] / 255)[0]) / slope
            if u.min() >= 0 and u.max() <= 255 and 0 <= radius - distance < 1e-3 * radius:
                return u.astype(np.uint8)


@pytest.fixture(scope="module", params=list(SMALL))
def voted(request: pytest.FixtureRequest) -> Iterator[Voted]:
    fit = fit_for(*SMALL[request.param])
    w = top_singular(fit)
    weights = np.rint(w / np.abs(w).max() * 60).astype(np.int64)
    t = int(128 * weights.sum())
    config = CheckpointConfig(
        name="linear", architecture="test", classes=("below", "above"), input_shape=(3, *fit.crop),
        mean=(0.0,) * 3, std=(1.0,) * 3, sigma=SIGMA, resize=fit.resize,
        files={"model.safetensors": "sha256:" + 64 * "0"},
    )  # fmt: skip
    network = nn.Sequential(nn.Identity(), Threshold(weights, t))
    options = {"device": "cpu", "batch": 450, "workers": 1, "precision": "fp32", "compile": False}
    with voter_of(network, input_shape=config.input_shape, sigma=SIGMA, **options) as voter:
        line = Line(fit, weights / np.linalg.norm(weights), float((t - 0.5) / 255 / np.linalg.norm(weights)))
        yield Voted(line, SmoothedClassifier(config, voter=voter, issuer=EvaluationSeed(bytes(range(32)))))


def false_certificates(voted: Voted, runs: int) -> int:
    """Of so many uploads, just inside a radius that some count of votes proves: how many get a false certificate."""
    generator, fit, false, certified = np.random.default_rng(7), voted.line.fit, 0, 0
    for i in range(runs):
        k = round((0.6, 0.8, 0.97)[i % 3] * PLAN.n)
        proved = SIGMA * float(ndtri(clopper_pearson_lower(k, PLAN.n, PLAN.alpha)))
        side = 1 if i % 2 else -1
        u = voted.upload(upload_radius(round_down(proved), fit, voted.line.w.size), side, generator)
        certificate = voted.classifier.certify(u, PLAN)
        certified += not certificate.abstained
        false += not certificate.abstained and (
            certificate.class_id != int(side > 0) or certificate.upload_radius > voted.line.upload_distance(u)
        )
    assert certified > runs / 2
    return false


def assert_sound(voted: Voted, runs: int) -> None:
    false = false_certificates(voted, runs)
    p = float(binom.sf(false - 1, runs, PLAN.alpha))
    assert p >= FALSE_ALARM, f"{false} of {runs} certificates are false at alpha = {PLAN.alpha}: p = {p:.2g}"


def test_false_radii_at_the_upload_are_no_more_than_alpha(voted: Voted) -> None:
    assert_sound(voted, 400)


def test_a_wrong_norm_is_caught(voted: Voted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgotten where it is above 1, counted twice where it is below."""

    def broken(radius: float, fit: Fit, dims: int) -> float:
        return round_down(radius / min(1.0, fit.norm**2))

    monkeypatch.setattr("macer_serve.smoothed.upload_radius", broken)
    with pytest.raises(AssertionError, match="certificates are false"):
        assert_sound(voted, 120)
