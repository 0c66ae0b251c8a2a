"""Hostile records end in words: never a crash, never an unprintable message."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from brightness import config, image
from checking import Made, at, changed, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from macer_serve.errors import ParameterError
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw
from macer_serve.verification import Verdict, read_document, verify
from macer_serve.verification.engines import options_like, refused_batch
from macer_serve.voters import VoterOptions

HOSTILE = [
    b"", b"{", b"null", b"[]", b"5", b'"certificate"', b"\xff\xfe", b"\x00" * 100, b"[" * 200_000, b'{"a":' * 100_000,
    b"1" * 10_000, b"NaN", b'{"certificate": {}}', b'{"certificate": 5}', b'{"radius": 1, "radius": 2}', b"[1e999]",
    b" " * (17 * 2**20), b"[" + b"[]," * 2_000_000 + b"[]]", b'{"\\u001b[2J": 1}',
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=[f"{d[:12]!r}" for d in HOSTILE])
def test_what_is_no_certificate(data: bytes) -> None:
    with pytest.raises(ParameterError) as caught:
        read_document(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


STRANGE = st.sampled_from(
    [
        None, True, -1, 0, 1, 2, 2**31, 2**52, 2**70, 1e300, -1e-300, 5e-324, 0.5, -0.0, "", "x", "\ud800", "\x1b[2J",
        [], [[]], {}, {"a": 1}, [1, 2], [-1], ["a"], [[1]], [[[1, 2]]], [[[-1, 5]]], "n", "soft", "predict",
    ]
)  # fmt: skip


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_fields_end_in_words(honest: Made, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["fixed", "tolerance", "two-sided", "soft", "predict", "resized", "abstained"]))
    pixels, c = honest[name]
    record: Any = c.to_json()
    for _ in range(data.draw(st.integers(1, 3))):
        path: tuple[Any, ...] = (data.draw(st.sampled_from(sorted(record))),)
        while isinstance(at(record, path), dict | list) and at(record, path) and data.draw(st.booleans()):
            inner = at(record, path)
            path = (*path, data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner)))))
        record = changed(record, path, data.draw(STRANGE))
    try:
        report = check(record, pixels)
    except ParameterError:
        return
    json.dumps(report.to_json())
    assert all(f.words.isprintable() for f in report.findings)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "torch-cpu-fp32-b64",
            {"engine": "torch", "device": "cpu", "compile": False, "batch": 64, "precision": "fp32"},
        ),
        ("torch-cpu-bf16-compiled-b256", {"engine": "torch", "device": "cpu", "compile": True, "batch": 256}),
        (
            "openvino-cpu-int8-b256",
            {"engine": "openvino", "device": "cpu", "precision": "int8", "compile": False, "batch": 256},
        ),
        ("jax-cpu-fp32-b64", {}),
        ("onnx", {}),
    ],
)
def test_an_engine_like_the_records(name: str, options: dict[str, Any]) -> None:
    assert options_like(f"{name}:0123456789abcdef", 32 * 32) == VoterOptions(**options)
    assert options_like(name, 32 * 32) == VoterOptions()


@pytest.mark.parametrize(
    ("engine", "pixels", "most"),
    [
        ("torch-cpu-fp32-b1024", 32 * 32, None),
        ("torch-cpu-fp32-b1025", 32 * 32, "1,024"),
        ("torch-cpu-fp32-b8192", 28 * 28, "1,024"),
        ("torch-cpu-bf16-compiled-b8192", 64 * 64, "1,024"),
        ("torch-cpu-fp32-b64", 224 * 224, None),
        ("torch-cpu-fp32-b65", 224 * 224, "64"),
        ("onnx-cpu-fp32-b256", 224 * 224, "64"),
        ("openvino-cpu-int8-b8192", 299 * 299, "64"),
        ("torch-cuda-fp32-b8192", 32 * 32, None),
        ("torch-cuda-bf16-compiled-b2048", 224 * 224, None),
        ("torch-cuda-bf16-compiled-b2049", 224 * 224, "2,048"),
        ("torch-cpu-fp32-b9999", 32 * 32, "1,024"),
        ("torch-cuda-fp32-b99999", 32 * 32, "8,192"),
        ("torch-cpu-fp32-b0", 32 * 32, None),  # no name of an engine: nothing is opened by it
        ("junk", 32 * 32, None),
    ],
)
def test_a_record_does_not_choose_the_auditors_memory(engine: str, pixels: int, most: str | None) -> None:
    name = f"{engine}:0123456789abcdef"
    words = refused_batch(name, pixels)
    opened = options_like(name, pixels, "cpu" if "-cpu-" in engine else None).batch
    if most is None:
        assert words is None
        assert opened in (None, int(engine.rpartition("-b")[2] or 0) if "-b" in engine else None)
    else:
        assert words is not None
        assert words.endswith(f"is refused: at most {most} copies of this size are run at once here")
        assert opened is None


def test_millions_of_votes_are_not_counted_for_whoever_asks(g: SmoothedClassifier) -> None:
    """Anybody can write an unsigned record, and the auditor's machine would be busy for as long as they like."""
    model_input, plan = g.model_input(image(220)), Plan(n0=50, n=2_000_000)
    run = g.certification(model_input, plan)
    while not run.done:
        draw = run.wants()
        assert isinstance(draw, Draw)
        run.add(draw, np.array([0, 0, len(draw)]))
    record = g.certificate(model_input, run, g.seed_proof(model_input, plan), "torch-cpu-fp32-b256:0123456789abcdef")
    document = read_document(json.dumps(record.to_json()).encode())
    report = verify(document, image(220), config(), voter=lambda kind: pytest.fail("a voter was opened"))
    assert report.verdict is Verdict.NOT_AUTHENTICATED
    assert any("2,000,050 votes are recorded" in f.words for f in report.findings)
