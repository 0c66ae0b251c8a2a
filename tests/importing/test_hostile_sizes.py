"""What asks for any amount of memory or time is refused at once; so are facts outside their limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from importing.unfit_graphs import FACTS, FLATTEN, RANDOM, changed, plain, refused, set_input, with_nodes
from onnx import TensorProto, helper

from macer_serve import onnx_trial
from macer_serve.base_classifier import error_of_batch
from macer_serve.cli import main
from macer_serve.cli.exit_codes import EXIT_CODES
from macer_serve.errors import CheckpointError, EngineError, EngineMismatchError, MacerError, ParameterError
from macer_serve.importing import Facts, import_model
from macer_serve.importing.wrapping import _require_same

PRODUCT = helper.make_node("MatMul", ["flat", "w"], ["raw"])


def with_constant(*nodes: Any, **weights: Any) -> Any:
    """Returns a network that adds the largest value of `huge` to its logits."""
    ending = [
        helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0),
        helper.make_node("Add", ["raw", "most"], ["out"]),
    ]
    return with_nodes(FLATTEN, PRODUCT, *nodes, *ending, w=RANDOM, **weights)


def with_loop() -> Any:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["x", "x"], ["y"])],
        "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, None)],
        [value("d", TensorProto.BOOL, []), value("y", TensorProto.FLOAT, None)],
    )
    loop = helper.make_node("Loop", ["steps", "true", "raw"], ["out"], body=body)
    return with_nodes(FLATTEN, PRODUCT, loop, w=RANDOM, steps=np.array(2**40), true=np.array(True))


ONE = np.ones(1, np.float32)
UNBOUNDED: dict[str, tuple[Any, type[MacerError], str]] = {
    "2^30 numbers": (
        with_constant(helper.make_node("ConstantOfShape", ["s"], ["huge"]), s=np.array([2**30])),
        EngineError,
        "need more than 4 GiB",
    ),
    "2^40 numbers": (
        with_constant(helper.make_node("Expand", ["one", "s"], ["huge"]), s=np.array([2**20, 2**20]), one=ONE),
        EngineError,
        "need more than 4 GiB",
    ),
    "a range of 10^12": (
        with_constant(
            helper.make_node("Range", ["a", "b", "c"], ["huge"]), a=np.float32(0), b=np.float32(1e12), c=np.float32(1)
        ),
        EngineError,
        "need more than 4 GiB",
    ),
    "a loop": (with_loop(), CheckpointError, "it uses Loop, which may run for any time"),
    "a sparse tensor of 2^60": (
        changed(lambda m: m.graph.sparse_initializer.add().dims.extend([2**30, 2**30])),
        CheckpointError,
        "it has sparse tensors",
    ),
    "a batch of 2^40": (changed(set_input(TensorProto.FLOAT, 2**40, 3, 4, 4)), CheckpointError, "is a batch of 1,099,"),
    "an input of 2^40": (changed(set_input(TensorProto.FLOAT, "b", 3, 2**40, 4)), ParameterError, "at most 4,194,304"),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_graph_without_bounds_is_refused(name: str, tmp_path: Path) -> None:
    model, kind, words = UNBOUNDED[name]
    refused(model, tmp_path, kind, words)


def test_a_graph_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_trial, "MAX_SECONDS", 0.05)
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["p0"])]
    nodes += [helper.make_node("MatMul", [f"p{i}", "p0"], [f"p{i + 1}"]) for i in range(1000)]
    nodes += [helper.make_node("Identity", ["p1000"], ["huge"])]
    refused(with_constant(*nodes, s=np.array([1000, 1000])), tmp_path, EngineError, r"within 0\.05 s")


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_size_is_one_of_any_size(size: int, tmp_path: Path) -> None:
    """Some exporters write an unknown size so."""
    onnx.save(changed(set_input(TensorProto.FLOAT, size, 3, 4, 4)), tmp_path / "net.onnx")
    assert import_model(tmp_path / "net.onnx", tmp_path / "out", FACTS).input_shape == (3, 4, 4)


METADATA = {"macer_format": "1", "sigma": "0.25", "classes": '["a","b","c","d","e"]', "resize": "4", "name": "mine"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("resize", "1e999", "cannot convert float infinity"),
        ("resize", "[" * 100_000, "nested too deeply"),
        ("resize", "9" * 5000, "4300 digits"),
        ("resize", "0", "resize must lie in 1 to 8192"),
        ("sigma", "NaN", "sigma must lie in"),
        ("sigma", "[1]", "float"),
        ("classes", "5", "not iterable"),
        ("classes", json.dumps(["\ud800", "b", "c", "d", "e"]), "valid Unicode"),
        ("classes", "[" * 500 + "]" * 500, "nested too deeply"),
        ("name", "x" * 1000, "at most 200 characters"),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_metadata_are_refused(key: str, value: str, words: str, tmp_path: Path) -> None:
    model = plain()
    onnx.helper.set_model_props(model, {**METADATA, key: value})
    refused(model, tmp_path, CheckpointError, words, Facts())


OPTIONS = {"--sigma": "0.25", "--classes": "5", "--range": "0,255"}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--classes", "9999999999", "2 to 100,000 classes"),
        ("--classes", "9" * 5000, "2 to 100,000 classes"),
        ("--classes", "1", "2 to 100,000 classes"),
        ("--classes", "/dev/zero", "--classes /dev/zero: /dev/zero is not a file"),
        ("--input-shape", "3,60000,60000", "at most 4,194,304 values"),
        ("--resize", "0", "resize must lie in 1 to 8192"),
        ("--resize", "99999999999", "resize must lie in 1 to 8192"),
        ("--std", "1e300", "std must lie within 1e+06"),
        ("--std", "1e-300", "std must be at least 1e-06"),
        ("--mean", "1e30", "mean must lie within 1e+06"),
        ("--range", "0,1e-300", "must span at least 1e-06"),
        ("--sigma", "nan", "sigma must lie in [0.005, 4]"),
        ("--sigma", "1e9", "sigma must lie in [0.005, 4]"),
    ],
    ids=lambda text: text[:14],
)
def test_options_outside_their_limits_are_refused(option: str, value: str, words: str, tmp_path: Path) -> None:
    onnx.save(plain(), tmp_path / "net.onnx")
    options = [part for pair in {**OPTIONS, option: value}.items() for part in pair]
    done = CliRunner().invoke(main, ["import", str(tmp_path / "net.onnx"), "--out", str(tmp_path / "out"), *options])
    assert done.exit_code == EXIT_CODES[ParameterError]
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_denoiser_without_end_is_refused(tmp_path: Path) -> None:
    onnx.save(plain(), tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match="is not a file"):
        import_model(tmp_path / "net.onnx", tmp_path / "out", FACTS, denoiser="/dev/zero")


@pytest.mark.parametrize(("altered", "found"), [(0.0, False), (0.1, True)])
def test_a_masked_class_hides_no_difference_of_the_others(altered: float, found: bool) -> None:
    """A logit of -1e9 allowed all others to differ by 20,000."""
    pixels = np.random.default_rng(0).random((3, 3, 4, 4), dtype=np.float32)
    mask = np.array([-1e9, 0, 0, 0, 0], np.float32)
    graph = with_nodes(FLATTEN, PRODUCT, helper.make_node("Add", ["raw", "mask"], ["out"]), w=RANDOM / 100, mask=mask)
    graph.graph.input[0].name = "pixels"
    graph.graph.node[0].input[0] = "pixels"

    def original(batch: Any) -> Any:
        return batch.reshape(len(batch), -1) @ (RANDOM / 100) + mask + altered * np.eye(5, dtype=np.float32)[1]

    if not found:
        _require_same(graph.SerializeToString(), original, pixels)
        return
    with pytest.raises(EngineMismatchError, match="is allowed"):
        _require_same(graph.SerializeToString(), original, pixels)


def test_a_batch_of_one_is_compared_on_the_scale_of_all() -> None:
    plain = np.array([[100.0, 1.0], [101.0, 2.0], [102.0, 4.0]], np.float32)
    assert error_of_batch(plain[:1], plain) == 0.0
    assert error_of_batch(plain[:1] + np.float32(1e-5), plain) < 1e-4
    assert error_of_batch(plain[:1] + np.float32(0.1), plain) > 1e-2
    assert error_of_batch(plain[:1, :1], plain) == float("inf")
