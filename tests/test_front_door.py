"""What a user of the library meets first: names, what is taken for an image, what a certificate looks like."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import macer_serve
from macer_serve import Plan, SmoothedClassifier, VoterOptions
from macer_serve.errors import EngineError, MacerError, ParameterError, TooLargeError, UndecodableError, UploadError
from macer_serve.images import UploadLimits

SHIP = Path(__file__).parent / "images" / "0001-ship.png"
CAT = Path(__file__).parent / "images" / "0000-cat.png"
PLAN = Plan(n0=20, n=100, alpha=0.01)


@pytest.fixture(scope="module")
def g() -> Iterator[SmoothedClassifier]:
    options = VoterOptions(engine="torch", device="cpu", batch=64, workers=1, precision="fp32", compile=False)
    classifier = SmoothedClassifier.load("bundled:cifar10", secret=bytes(32), options=options)
    yield classifier
    classifier.voter.close()  # type: ignore[union-attr]


def test_the_names_are_there_and_nothing_is_loaded_for_them() -> None:
    code = (
        "import sys, macer_serve\n"
        "assert not {'numpy', 'torch', 'scipy', 'PIL'} & set(sys.modules)\n"
        "assert set(macer_serve.__all__) <= set(dir(macer_serve))\n"
        "for name in macer_serve.__all__: getattr(macer_serve, name)\n"
        "from macer_serve import Plan, SmoothedClassifier\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        macer_serve.nothing  # noqa: B018


WAYS: dict[str, Callable[[], Any]] = {
    "path": lambda: SHIP,
    "text": lambda: str(SHIP),
    "bytes": SHIP.read_bytes,
    "bytearray": lambda: bytearray(SHIP.read_bytes()),
    "memoryview": lambda: memoryview(SHIP.read_bytes()),
    "file": lambda: SHIP.open("rb"),
    "BytesIO": lambda: io.BytesIO(SHIP.read_bytes()),
    "Pillow": lambda: Image.open(SHIP),
    "array": lambda: np.asarray(Image.open(SHIP).convert("RGB")),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_the_same_however_it_is_given(way: str, g: SmoothedClassifier) -> None:
    assert g.question(WAYS[way]()).digest == g.question(SHIP).digest


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "I;16", "CMYK"])
def test_a_pillow_image_is_what_its_file_would_be(mode: str, orientation: int, g: SmoothedClassifier) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[:, :, :1].astype(np.uint16)[:, :, 0] * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    image.save(data, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
    sent = data.getvalue()
    assert g.question(Image.open(io.BytesIO(sent))).digest == g.question(sent).digest


def test_a_list_gives_a_list(g: SmoothedClassifier) -> None:
    one = g.certify(SHIP, PLAN)
    both = g.certify([SHIP, CAT.read_bytes()], PLAN)
    assert (both[0], len(both)) == (one, 2)
    assert g.certify((), PLAN) == []


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (None, ParameterError, "an image must be a path, .* not NoneType"),
        (3.5, ParameterError, "not float"),
        ({"image": 1}, ParameterError, "not dict"),
        (io.StringIO("text"), ParameterError, "binary mode"),
        ("https://example.org/cat.png", ParameterError, "not fetched"),
        (SHIP.parent, UndecodableError, "is a folder"),
        ("no\0path", UndecodableError, "null"),
        (np.zeros((4, 4)), ParameterError, "uint8"),
        (np.zeros((4, 4, 4), np.uint8), ParameterError, "1 or 3 channels"),
        (np.zeros((0, 4), np.uint8), ParameterError, "non-empty"),
        (b"", UndecodableError, "empty"),
        (io.BytesIO(b"junk"), UndecodableError, "not an image"),
    ],
)
def test_anything_else_is_refused_with_what_is_taken(
    image: Any, error: type[MacerError], words: str, g: SmoothedClassifier
) -> None:
    with pytest.raises(error, match=words):
        g.certify(image, PLAN)


def test_limits_hold_for_every_way(g: SmoothedClassifier) -> None:
    small = SmoothedClassifier(g.config, voter=g.voter, limits=UploadLimits(bytes=100, pixels=50))
    for way in ("path", "bytes", "file", "Pillow"):
        with pytest.raises(TooLargeError):
            small.question(WAYS[way]())
    closed = Image.open(SHIP)
    closed.close()
    with pytest.raises(UploadError, match="cannot be loaded"):
        g.question(closed)
    frames = io.BytesIO()
    first = Image.new("RGB", (8, 8))
    first.save(frames, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    with pytest.raises(UploadError, match="several pictures"):
        g.question(Image.open(frames))


def test_plans_take_numpys_numbers() -> None:
    plan = Plan(n0=np.int64(20), n=np.uint32(100), alpha=np.float64(0.01), tolerance=np.float32(0.25))  # type: ignore[arg-type]
    assert plan == Plan(n0=20, n=100, alpha=0.01, tolerance=0.25)
    assert {type(v) for v in (plan.n0, plan.n)} == {int}
    assert Plan.from_json(plan.to_json()) == plan
    for wrong in (True, np.bool_(True), 20.0, np.float64(20), "20"):
        with pytest.raises(ParameterError, match="n0 must lie"):
            Plan(n0=wrong)  # type: ignore[arg-type]


def test_a_certificate_is_shown_in_a_line(g: SmoothedClassifier) -> None:
    c = g.certify(SHIP, PLAN)
    assert repr(c) == (
        f"<Certificate: ship, radius {c.radius:.6f}, upload radius {c.upload_radius:.6f}, alpha 0.01, 100 votes>"
    )
    abstained = g.certify(SHIP, Plan(n0=20, n=1))
    assert repr(abstained).startswith("<Certificate: abstained, 1 vote proves nothing at alpha ")
    hostile = replace(c, label="<script>")
    assert "<script>" not in hostile._repr_html_()
    assert f"{c.radius:.6f}" in c._repr_html_()


def test_pickling_a_loaded_classifier_says_what_to_do(g: SmoothedClassifier) -> None:
    with pytest.raises(EngineError, match="cannot be pickled: load it in each process"):
        pickle.dumps(g)


def _in_child(g: SmoothedClassifier, answers: Any) -> None:
    try:
        g.certify(SHIP, PLAN)
    except EngineError as error:
        answers.put(str(error))
    else:
        answers.put("certified")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_is_told_and_does_not_hang(g: SmoothedClassifier) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(g, answers))
    child.start()
    assert "load the classifier in each process" in answers.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0
