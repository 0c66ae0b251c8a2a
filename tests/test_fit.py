"""The fit is linear, exact, and stretches no distance by more than the stated norm."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from macer_serve.errors import ParameterError
from macer_serve.fit import FRACTION_BITS, fit_for, upload_radius

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

STEP = 2**FRACTION_BITS
Bytes8 = NDArray[np.uint8]


def noise(*shape: int, seed: int = 0) -> Bytes8:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def grey3(grey: NDArray[np.integer]) -> Bytes8:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


# --- the fit --------------------------------------------------------------------------------------------------------


def triangle(size: int, resized: int) -> NDArray[np.float64]:
    """The whole antialiased bilinear matrix by its definition: float64 [resized, size]."""
    if size == resized:
        return np.eye(size)
    scale = size / resized
    centres = (np.arange(resized)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centres) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("upload", "resize", "crop", "norm"),
    [
        ((375, 500), 256, (224, 224), 0.684),
        ((480, 640), 32, (32, 32), 0.066),
        ((20, 20), 32, (32, 32), 1.606),
        ((32, 32), 32, (32, 32), 1.0),
    ],
)
def test_norms(upload: tuple[int, int], resize: int, crop: tuple[int, int], norm: float) -> None:
    fit = fit_for(upload, resize, crop)
    assert round(fit.norm, 3) == norm
    (top, left), (height, width) = fit.offset, fit.crop
    A_h = triangle(upload[0], fit.resized_size[0])[top : top + height]
    A_w = triangle(upload[1], fit.resized_size[1])[left : left + width]
    assert fit.norm == pytest.approx(np.linalg.norm(A_h, 2) * np.linalg.norm(A_w, 2), rel=1e-5)  # weights have 21 bits


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.data())
def test_the_norm_is_that_of_the_matrices_never_below_it(h: int, w: int, resize: int, draw: st.DataObject) -> None:
    crop = (draw.draw(st.integers(1, resize)), draw.draw(st.integers(1, resize)))
    fit = fit_for((h, w), resize, crop)
    exact = np.linalg.norm(fit.rows.dense(), 2) * np.linalg.norm(fit.columns.dense(), 2)
    assert exact * (1 - 1e-14) <= fit.norm <= exact * (1 + 2e-12)
    for axis, size in ((fit.rows, h), (fit.columns, w)):
        assert (axis.weights >= 0).all()
        assert (axis.weights.sum(axis=1) == 1.0).all()  # exactly: a flat upload stays flat
        lo, hi = axis.source
        assert 0 <= lo < hi <= size


def test_norms_are_exactly_one_without_resampling() -> None:
    assert fit_for((32, 32), 32, (32, 32)).norm == 1.0
    assert not fit_for((32, 32), 32, (32, 32)).resampled
    assert fit_for((40, 32), 32, (32, 24)).norm == 1.0
    assert not fit_for((40, 32), 32, (32, 24)).resampled
    assert fit_for((32, 32), 32, (32, 32), channels=1).resampled
    assert fit_for((32, 32), 32, (32, 32), channels=1).norm == pytest.approx(1 / math.sqrt(3), rel=1e-11)


def test_the_norm_is_reached_by_the_top_singular_vectors_and_never_passed() -> None:
    for upload, resize, crop in [((37, 50), 16, (16, 14)), ((20, 20), 32, (32, 32)), ((64, 48), 24, (20, 24))]:
        fit = fit_for(upload, resize, crop)
        assert fit.norm > 0
        middle = np.full((*upload, 3), 128, np.uint8)
        tops = [np.linalg.svd(axis.dense())[2][0] for axis in (fit.rows, fit.columns)]
        delta = np.zeros(upload)
        delta[slice(*fit.rows.source), slice(*fit.columns.source)] = np.abs(np.outer(*tops))
        steps = np.rint(delta / delta.max() * 127).astype(np.uint8)[:, :, None].repeat(3, axis=2)
        for change, least in ((steps, 0.999), (noise(*upload, 3) % 127, 0.0)):
            moved = (fit.apply(middle + change) - fit.apply(middle)) / STEP
            ratio = np.linalg.norm(moved) / np.linalg.norm(change.astype(float))
            assert least * fit.norm <= ratio <= fit.norm * (1 + 1e-6)  # 1e-6: two roundings to 18 bits


SHAPES = [((375, 500), 256, (224, 224)), ((48, 64), 32, (32, 32)), ((20, 20), 32, (32, 32)), ((64, 31), 40, (37, 40))]


@pytest.mark.parametrize(("upload", "resize", "crop"), SHAPES)
def test_each_coordinate_is_the_exact_map_rounded_once(
    upload: tuple[int, int], resize: int, crop: tuple[int, int]
) -> None:
    fit, u = fit_for(upload, resize, crop), noise(*upload, 3)
    source = u[slice(*fit.rows.source), slice(*fit.columns.source)].astype(float)
    exact = np.einsum("ih,hwc,jw->ijc", fit.rows.dense(), source, fit.columns.dense(), optimize=True)
    x = fit.apply(u)
    assert x.dtype == np.int32
    assert x.shape == (*crop, 3)
    assert np.abs(x - exact * STEP).max() <= 0.5
    np.testing.assert_array_equal(x, np.rint(exact * STEP))  # in another order of summation, and yet identical
    # In pixel values in [0, 1]: the distance that `upload_radius` allows for.
    assert np.linalg.norm(x / STEP - exact) / 255 <= math.sqrt(x.size) / (510 * STEP)


@pytest.mark.parametrize(("upload", "resize", "crop"), SHAPES)
def test_the_fit_is_torchvisions_and_pillows_antialiased_resize(
    upload: tuple[int, int], resize: int, crop: tuple[int, int]
) -> None:
    u = noise(*upload, 3)
    x = fit_for(upload, resize, crop).apply(u) / STEP
    tensor = torch.from_numpy(u.astype(np.float64)).permute(2, 0, 1)
    theirs = tvf.center_crop(tvf.resize(tensor, [resize], antialias=True), list(crop))
    assert np.abs(x - theirs.permute(1, 2, 0).numpy()).max() < 0.002
    pillow = tvf.center_crop(tvf.resize(Image.fromarray(u), [resize], antialias=True), list(crop))
    assert np.abs(x - np.asarray(pillow)).max() < 1.1  # Pillow rounds to 8 bits after each axis


def test_the_fit_is_linear() -> None:
    fit = fit_for((37, 50), 16, (16, 14))
    u, v = noise(37, 50, 3, seed=1) // 2, noise(37, 50, 3, seed=2) // 2
    assert np.abs(fit.apply(u + v) - fit.apply(u) - fit.apply(v)).max() <= 1  # three roundings of one half
    assert (fit.apply(np.full((37, 50, 3), 200, np.uint8)) == 200 * STEP).all()
    assert (fit.apply(np.zeros((37, 50, 3), np.uint8)) == 0).all()


def test_identity_and_crop_are_exact() -> None:
    u = noise(40, 32, 3)
    np.testing.assert_array_equal(fit_for((40, 32), 32, (32, 24)).apply(u), u[4:36, 4:28].astype(np.int32) * STEP)
    np.testing.assert_array_equal(fit_for((32, 32), 32, (32, 32)).apply(u[:32]), u[:32].astype(np.int32) * STEP)


def test_one_channel_models_read_the_mean_and_grey_stays_on_the_lattice() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    fit = fit_for((16, 16), 16, (16, 16), channels=1)
    np.testing.assert_array_equal(fit.apply(grey3(grey)), grey[:, :, None].astype(np.int32) * STEP)
    u = noise(16, 16, 3)
    np.testing.assert_array_equal(fit.apply(u)[..., 0], np.rint(u.sum(axis=2, dtype=int) * STEP / 3))
    colour = fit_for((37, 50), 16, (16, 14))
    mixed = fit_for((37, 50), 16, (16, 14), channels=1)
    assert mixed.norm == pytest.approx(colour.norm / math.sqrt(3), rel=1e-11)
    u = noise(37, 50, 3)
    assert np.abs(mixed.apply(u)[..., 0] - colour.apply(u).mean(axis=2)).max() <= 1


def peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("upload", [(1, 25_000_000), (25_000_000, 1), (2, 12_500_000)])
@pytest.mark.parametrize(("resize", "crop"), [(32, (32, 32)), (256, (224, 224))])
def test_extreme_aspect_ratios_read_only_their_middle(
    upload: tuple[int, int], resize: int, crop: tuple[int, int]
) -> None:
    u = np.zeros((*upload, 3), np.uint8)
    fit_for.cache_clear()
    assert peak(lambda: fit_for(upload, resize, crop).apply(u)) < 30e6
    fit = fit_for(upload, resize, crop)
    long = 0 if upload[0] > upload[1] else 1
    lo, hi = (fit.rows, fit.columns)[long].source
    assert abs((lo + hi) / 2 - upload[long] / 2) <= 2
    assert hi - lo <= 20
    u[(slice(None), slice(lo, hi)) if long else slice(lo, hi)] = 7
    assert (fit.apply(u) == 7 * STEP).all()


@pytest.mark.parametrize(("resize", "crop"), [(8, (8, 8)), (256, (224, 224))])
def test_a_large_upload_is_fitted_in_little_memory(resize: int, crop: tuple[int, int]) -> None:
    u = np.full((5000, 5000, 3), 255, np.uint8)
    fit = fit_for((5000, 5000), resize, crop)
    assert peak(lambda: np.testing.assert_array_equal(fit.apply(u), 255 * STEP)) < 60e6
    assert peak(lambda: fit_for((4999, 5000), resize, crop)) < 60e6


def test_wrong_uploads_and_impossible_fits_are_refused() -> None:
    fit = fit_for((20, 20), 32, (32, 32))
    for u in (noise(20, 21, 3), noise(20, 20), noise(20, 20, 4), noise(20, 20, 3).astype(float)):
        with pytest.raises(ParameterError, match="expected uint8"):
            fit.apply(u)
    for upload, resize, crop, channels in [
        ((0, 20), 32, (32, 32), 3),
        ((20, 20), 31, (32, 16), 3),
        ((20, 20), 32, (0, 32), 3),
        ((20, 20), 32, (32, 32), 2),
    ]:
        with pytest.raises(ParameterError, match="a fit needs"):
            fit_for(upload, resize, crop, channels)


def test_a_fit_is_built_once_and_says_what_it_does() -> None:
    fit = fit_for((375, 500), 256, (224, 224))
    assert fit_for((375, 500), 256, (224, 224)) is fit
    assert json.loads(json.dumps(fit.to_json())) == {
        "upload_size": [375, 500],
        "resize": 256,
        "resized_size": [256, 341],
        "crop": [224, 224],
        "crop_offset": [16, 58],
        "channels": 3,
        "norm": fit.norm,
    }


# --- the radius of the upload -----------------------------------------------------------------------------------------


def test_the_radius_is_the_model_inputs_own_where_nothing_is_resampled() -> None:
    for fit in (fit_for((32, 32), 32, (32, 32)), fit_for((40, 32), 32, (32, 24))):
        for radius in (0.0, 0.1234567890123, 0.952774):
            assert upload_radius(radius, fit, 3072) == radius


def test_the_radius_is_never_below_zero() -> None:
    fit = fit_for((375, 500), 256, (224, 224))
    for radius in (0.0, 1e-9, 5e-6):
        assert upload_radius(radius, fit, 224 * 224 * 3) == 0.0
    assert upload_radius(0.25, fit, 224 * 224 * 3) == 0.365415  # 0.36541505...


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 20), st.sampled_from(SHAPES), st.sampled_from([1, 3]))
def test_the_radius_is_the_formulas_and_never_rounded_up(
    radius: float, shape: tuple[tuple[int, int], int, tuple[int, int]], channels: int
) -> None:
    fit = fit_for(*shape, channels)
    d = channels * fit.crop[0] * fit.crop[1]
    exact = (radius - 2 * math.sqrt(d) / (510 * 2**18) - 1e-9) / fit.norm
    answer = upload_radius(radius, fit, d)
    assert answer <= max(0.0, exact)
    assert answer >= exact - 1.1e-6
    assert abs(answer * 1e6 - round(answer * 1e6)) < 1e-6


def test_a_larger_change_of_upload_than_allowed_is_needed_to_leave_the_radius() -> None:
    """Whatever 8-bit change stays within the upload's radius, the stored model input moves less than R."""
    fit, generator = fit_for((20, 20), 32, (32, 32)), np.random.default_rng(5)
    u = noise(20, 20, 3, seed=4)
    for _ in range(200):
        change = generator.integers(-3, 4, u.shape) * (generator.random(u.shape) < generator.random())
        v = np.clip(u + change, 0, 255).astype(np.uint8)
        distance = np.linalg.norm((v.astype(float) - u) / 255)
        moved = np.linalg.norm((fit.apply(v) - fit.apply(u)) / (255 * STEP))
        assert distance >= upload_radius(float(moved), fit, 3072)
