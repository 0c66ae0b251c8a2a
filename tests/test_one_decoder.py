"""One file has one model input, bit by bit, whichever way it comes: data set, command, library, Pillow, server."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from image_files import exif, hundreds_of_files, noise, saved
from PIL import Image
from starlette.requests import Request

from macer_serve import SmoothedClassifier, VoterOptions
from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.datasets import load_dataset
from macer_serve.errors import ParameterError
from macer_serve.images import UploadLimits
from macer_serve.issuing import EvaluationSeed
from macer_serve.serving.settings import LimitSettings
from macer_serve.serving.uploads import read_image

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of one class that holds all the files."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "val" / "a").mkdir(parents=True)
    for name, data in hundreds_of_files():
        (folder / "val" / "a" / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def g() -> Iterator[SmoothedClassifier]:
    """A classifier of two classes by the brightness of 32 x 32 pixels."""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    options = VoterOptions(engine="torch", device="cpu", batch=64, workers=1, precision="fp32", compile=False)
    classifier = SmoothedClassifier.from_module(
        module, sigma=0.25, classes=2, input_shape=(3, 32, 32), issuer=EvaluationSeed(bytes(32)), options=options
    )
    yield classifier
    classifier.voter.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def digests(root: Path, g: SmoothedClassifier) -> dict[Path, str]:
    """The digest of each file's model input, as its bytes give it."""
    found = {path: g.model_input(path.read_bytes()).digest for path in sorted((root / "val" / "a").iterdir())}
    assert len(found) >= 300
    assert len(set(found.values())) > 250, "one pixel, grey, is soon the same"
    return found


def test_a_data_set_has_the_input_of_its_files(root: Path, g: SmoothedClassifier, digests: dict[Path, str]) -> None:
    images = load_dataset("folder", root, "test")
    for i, (path, _) in enumerate(images.source.samples):
        seen = g.model_input(images[i][0])
        assert seen.digest == digests[Path(path)], path
        assert np.array_equal(seen.x, g.model_input(path).x)


WAYS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": str,
    "file": lambda path: path.open("rb"),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "Pillow by path": Image.open,
    "Pillow by file": lambda path: Image.open(io.BytesIO(path.read_bytes())),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_library_has_the_input_of_the_bytes(way: str, g: SmoothedClassifier, digests: dict[Path, str]) -> None:
    for path, digest in digests.items():
        image = WAYS[way](path)
        assert g.model_input(image).digest == digest, path
        if hasattr(image, "close"):
            image.close()


@pytest.mark.parametrize("copied", [False, True])
def test_a_loaded_pillow_image_has_the_same_input_or_is_refused(
    copied: bool, g: SmoothedClassifier, digests: dict[Path, str]
) -> None:
    refused = []
    for path, digest in digests.items():
        with Image.open(path) as image:
            image.load()
            try:
                assert g.model_input(image.copy() if copied else image).digest == digest, path
            except ParameterError:
                refused.append(path.name)
    assert 0 < len(refused) < 30, "Pillow does not tell of how many bits their transparent colour is"
    assert all(name.startswith(("colour0-depth2", "colour0-depth4", "colour2-depth8")) for name in refused), refused


def test_the_command_has_the_input_of_the_bytes(
    g: SmoothedClassifier, digests: dict[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmoothedClassifier, "load", lambda *_, **__: g)
    for path, digest in digests.items():
        result = CliRunner().invoke(main, ["predict", str(path), "--n0", "1", "--n", "1", "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["certificate"]["input"]["digest"] == digest, path


def test_the_server_has_the_input_of_the_bytes(digests: dict[Path, str]) -> None:
    allowed = LimitSettings()
    limits = UploadLimits(allowed.bytes, allowed.pixels)
    served = SmoothedClassifier(
        load_config("bundled:cifar10"), noise="exact", issuer=EvaluationSeed(bytes(32)), limits=limits
    )
    for path, digest in digests.items():
        assert served.model_input(asyncio.run(_uploaded(path.read_bytes()))).digest == digest, path


async def _uploaded(data: bytes) -> bytes:
    """The bytes that the server reads from a request with that body."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    headers = [(b"content-type", b"image/png"), (b"content-length", str(len(data)).encode())]
    return await read_image(Request({"type": "http", "method": "POST", "headers": headers}, receive), 10**7)


def test_the_server_and_data_sets_have_the_same_limits() -> None:
    allowed = LimitSettings()
    assert UploadLimits(allowed.bytes, allowed.pixels) == UploadLimits()


def test_a_data_set_is_upright_over_white_and_of_eight_bits(tmp_path: Path) -> None:
    """The stated pixels, so that all ways are not merely wrong alike."""
    rgb, alpha = noise(16, 24, 3), noise(16, 24, 1, seed=1)
    white = ((2 * (rgb.astype(int) * alpha + 255 * (255 - alpha.astype(int))) + 255) // 510).astype(np.uint8)
    wide = np.random.default_rng(0).integers(0, 2**16, (16, 24), dtype=np.uint16)
    palette = Image.fromarray(noise(16, 24) % 4, "P")
    palette.putpalette([10, 20, 30, 0, 0, 0, 200, 100, 50, 7, 8, 9])
    shown = np.array([[10, 20, 30], [255, 255, 255], [200, 100, 50], [7, 8, 9]], np.uint8)
    transparent = Image.fromarray(np.concatenate([rgb, alpha], axis=2))
    files = {
        "alpha.png": (saved(transparent, "PNG"), white),
        "alpha.webp": (saved(transparent, "WEBP", lossless=True, exact=True), white),
        "exif6.png": (saved(rgb, "PNG", exif=exif(6)), np.rot90(rgb, -1)),
        "grey16.png": (saved(Image.fromarray(wide), "PNG"), np.repeat((wide >> 8)[..., None], 3, axis=2)),
        "palette.png": (saved(palette, "PNG", transparency=1), shown[np.asarray(palette)]),
        "plain.png": (saved(rgb, "PNG"), rgb),
    }
    (tmp_path / "val" / "a").mkdir(parents=True)
    for name, (data, _) in files.items():
        (tmp_path / "val" / "a" / name).write_bytes(data)
    images = load_dataset("folder", tmp_path, "test")
    for (name, (_, pixels)), (seen, _) in zip(sorted(files.items()), images, strict=True):
        assert np.array_equal(seen, pixels), name
