"""Hostile and unfit ONNX files: each is refused in words, or handled and said so; nothing is executed or left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from brightness import SEEDS
from click.testing import CliRunner
from importing.foreign_files import SIGMA, model_of
from importing.unfit_graphs import (
    FACTS,
    FLATTEN,
    RANDOM,
    WEIGHTS,
    changed,
    plain,
    refused,
    set_input,
    with_nodes,
)
from onnx import TensorProto, helper, numpy_helper

from macer_serve.checkpoint import load_config
from macer_serve.cli import main
from macer_serve.cli.exit_codes import EXIT_CODES
from macer_serve.errors import CheckpointError, EngineError, MacerError, MissingFactsError, OutputError, ParameterError
from macer_serve.importing import Facts, import_model
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.noise import FRACTION_BITS
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import Task, VoterOptions

PLAN = Plan(n0=20, n=100, alpha=0.05)
SHIP = Path(__file__).parents[1] / "images" / "0001-ship.png"
OPTIONS = VoterOptions(engine="onnx", device="cpu", batch=32, workers=1)


def of(name: str) -> Any:
    """A network that ends in the operator."""
    return with_nodes(
        helper.make_node("Flatten", ["in"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["raw"], transB=1),
        helper.make_node(name, ["raw"], ["out"]),
        w=(WEIGHTS.reshape(5, -1) / 100).astype(np.float32),
        b=np.zeros(5, np.float32),
    )


def two_outputs(model: Any) -> None:
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["batch", 48]))


def another_domain(model: Any) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def an_unknown_operator(model: Any) -> None:
    model.graph.node[0].op_type = "Rounds"


def set_weight(value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        values = numpy_helper.to_array(model.graph.initializer[0]).copy()
        values[0, 0] = value
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))

    return change


def set_opset(version: int) -> Callable[[Any], None]:
    return lambda model: setattr(model.opset_import[0], "version", version)


UNFIT: dict[str, tuple[Any, type[MacerError], str]] = {
    "not a graph": (b"\x80\x04not a graph", CheckpointError, "not an ONNX file|no valid|inputs"),
    "empty": (b"", CheckpointError, "has 0 inputs"),
    "another domain": (changed(another_domain), CheckpointError, "does not define: com.example:Round"),
    "an unknown operator": (changed(an_unknown_operator), CheckpointError, "no valid"),
    "an operator set of tomorrow": (changed(set_opset(99)), MacerError, "onnxruntime cannot load|no valid"),
    "an operator set of yesterday": (changed(set_opset(5)), CheckpointError, "operator set 5"),
    "nan weights": (changed(set_weight(np.nan)), CheckpointError, "w has values that are not finite"),
    "infinite weights": (changed(set_weight(np.inf)), CheckpointError, "w has values that are not finite"),
    "two outputs": (changed(two_outputs), CheckpointError, r"2 outputs \(out, flat\)"),
    "bytes in": (changed(set_input(TensorProto.UINT8, "b", 3, 4, 4)), CheckpointError, "its input is UINT8"),
    "channels last": (changed(set_input(TensorProto.FLOAT, "b", 4, 4, 3)), CheckpointError, "config.json"),
    "one dimension less": (changed(set_input(TensorProto.FLOAT, "b", 48)), MissingFactsError, "shape of its input"),
    "one output": (
        with_nodes(FLATTEN, helper.make_node("MatMul", ["flat", "w"], ["out"]), outputs=["batch", 1], w=RANDOM[:, :1]),
        CheckpointError,
        "one output",
    ),
    "class numbers": (
        changed(
            lambda m: (
                m.graph.node.append(helper.make_node("ArgMax", ["out"], ["top"], axis=1)),
                m.graph.output[0].CopyFrom(helper.make_tensor_value_info("top", TensorProto.INT64, ["batch", 1])),
            )
        ),
        CheckpointError,
        "returns int64; float32 logits",
    ),
    "an output of rank 4": (
        with_nodes(helper.make_node("Relu", ["in"], ["out"]), outputs=["batch", 3, 4, 4]),
        CheckpointError,
        r"returns \[3, 3, 4, 4\] for 3 images; logits \[3, classes\]",
    ),
    "an output of rank 1": (
        with_nodes(FLATTEN, helper.make_node("ReduceMean", ["flat"], ["out"], axes=[1], keepdims=0), outputs=["batch"]),
        CheckpointError,
        r"returns \[3\]",
    ),
    "logits that are not finite": (of("Log"), CheckpointError, "not finite"),
    "random logits": (
        with_nodes(
            FLATTEN,
            helper.make_node("MatMul", ["flat", "w"], ["raw"]),
            helper.make_node("RandomNormalLike", ["raw"], ["noise"]),
            helper.make_node("Add", ["raw", "noise"], ["out"]),
            w=RANDOM,
        ),
        CheckpointError,
        "random numbers",
    ),
    "a scale over the batch": (
        with_nodes(
            FLATTEN,
            helper.make_node("DynamicQuantizeLinear", ["flat"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["again"]),
            helper.make_node("MatMul", ["again", "w"], ["out"]),
            w=RANDOM,
        ),
        CheckpointError,
        "uses DynamicQuantizeLinear: .* takes a scale over the batch",
    ),
    "a statistic of the batch": (
        with_nodes(
            FLATTEN,
            helper.make_node("MatMul", ["flat", "w"], ["raw"]),
            helper.make_node("ReduceMean", ["raw"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["raw", "mean"], ["out"]),
            w=RANDOM,
        ),
        MacerError,
        "depend on the batch",
    ),
    "a batch written into the graph": (
        model_of(
            [
                FLATTEN,
                helper.make_node("Concat", ["flat", "one"], ["more"], axis=1),
                helper.make_node("MatMul", ["more", "w"], ["out"]),
            ],
            {"one": np.ones((1, 1), np.float32), "w": np.concatenate([RANDOM, RANDOM[:1]])},
            inputs=[1, 3, 4, 4],
            outputs=[1, 5],
        ),
        CheckpointError,
        "dynamic batch dimension",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_classifier_is_refused(name: str, tmp_path: Path) -> None:
    model, kind, words = UNFIT[name]
    refused(model, tmp_path, kind, words)


@pytest.mark.parametrize("sizes", [("b", "c", "h", "w"), (None,) * 4, ("b", 3, "h", "w")])
def test_a_dynamic_shape_must_be_told(sizes: tuple[Any, ...], tmp_path: Path) -> None:
    model = changed(set_input(TensorProto.FLOAT, *sizes))
    refused(model, tmp_path, MissingFactsError, "the shape of its input")
    told = Facts(sigma=SIGMA, classes=5, value_range=(0, 255), input_shape=(3, 4, 4))
    assert import_model(tmp_path / "net.onnx", tmp_path / "out", told).input_shape == (3, 4, 4)
    wrong = Facts(sigma=SIGMA, classes=5, value_range=(0, 255), input_shape=(3, 5, 5))
    refused(model, tmp_path / "wrong", EngineError, "cannot run this graph", wrong)


def test_a_missing_shape_must_be_told(tmp_path: Path) -> None:
    model = changed(lambda m: [v[0].type.tensor_type.ClearField("shape") for v in (m.graph.input, m.graph.output)])
    refused(model, tmp_path, MissingFactsError, "the shape of its input")


def test_probabilities_are_taken_said_and_refused_to_the_soft_bound(tmp_path: Path) -> None:
    """Hard votes are the same: softmax keeps the order."""
    facts = Facts(sigma=SIGMA, classes=5, value_range=(0, 1))
    x = np.full((4, 4, 3), 100 << FRACTION_BITS, np.int32)
    votes = []
    for name in ("Identity", "Softmax"):
        onnx.save(of(name), tmp_path / f"{name}.onnx")
        import_model(tmp_path / f"{name}.onnx", tmp_path / name, facts)
        g = SmoothedClassifier.load(tmp_path / name, issuer=SEEDS, options=OPTIONS)
        model_input = g.model_input(np.full((4, 4, 3), 100, np.uint8))
        assert g.voter is not None
        votes += g.voter.submit([Task(x, bytes(16), Draw("estimation", 0, 200))]).result()
        if name == "Softmax":
            with pytest.raises(ParameterError, match="soft bound needs logits"):
                g.certification(model_input, Plan(bound="soft"))
        else:
            g.certification(model_input, Plan(bound="soft"))
    assert [load_config(tmp_path / name).outputs for name in ("Identity", "Softmax")] == ["logits", "probabilities"]
    np.testing.assert_array_equal(votes[0], votes[1])
    assert (votes[0] > 0).sum() >= 2
    options = ["--sigma", "0.25", "--classes", "5", "--range", "0,1", "--out", str(tmp_path / "again")]
    said = CliRunner().invoke(main, ["import", str(tmp_path / "Softmax.onnx"), *options])
    assert "ends in a softmax" in said.stdout
    predicted = CliRunner().invoke(
        main, ["predict", str(SHIP), "--checkpoint", str(tmp_path / "again"), "--bound", "soft", "--n", "10"]
    )
    assert predicted.exit_code == EXIT_CODES[ParameterError]
    assert "soft bound needs logits" in predicted.stderr


def test_a_place_that_cannot_be_written_gets_a_sentence(tmp_path: Path) -> None:
    onnx.save(plain(), tmp_path / "net.onnx")
    with pytest.raises(OutputError, match="cannot be written: "):
        import_model(tmp_path / "net.onnx", tmp_path / "net.onnx" / "out", FACTS)


@pytest.mark.parametrize("sizes", [[1, 48], [1, -1], [-1, 48]])
@pytest.mark.parametrize("kept", ["initializer", "node"])
def test_a_reshape_to_one_image_is_made_one_to_any_batch(sizes: list[int], kept: str, tmp_path: Path) -> None:
    """As torch's exporter writes `flatten` unless it is told that the batch is dynamic."""
    shape = np.array(sizes)
    constant = helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(shape, "v"))
    reshape = helper.make_node("Reshape", ["in", "s"], ["flat"])
    nodes = [*([constant] if kept == "node" else []), reshape, helper.make_node("MatMul", ["flat", "w"], ["out"])]
    weights = {"w": RANDOM, **({"s": shape} if kept == "initializer" else {})}
    onnx.save(model_of(nodes, weights, inputs=[1, 3, 4, 4], outputs=[1, 5]), tmp_path / "net.onnx")
    import_model(tmp_path / "net.onnx", tmp_path / "out", FACTS)
    g = SmoothedClassifier.load(tmp_path / "out", issuer=SEEDS, options=OPTIONS)
    assert g.certify(np.full((4, 4, 3), 128, np.uint8), PLAN).n == 100


def test_names_of_ours_in_a_foreign_graph_do_no_harm(tmp_path: Path) -> None:
    """Values and nodes may be called as the graphs are that engines put in front."""
    model = plain()
    onnx.save(model, tmp_path / "plain.onnx")
    names = {
        "in": "copies",
        "whole": "lattice_step",
        "flat": "pixels",
        "w": "copies_as_pixels",
        "out": "normalisation/sub",
    }
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    onnx.save(model, tmp_path / "ours.onnx")
    certified = []
    for name in ("plain", "ours"):
        import_model(tmp_path / f"{name}.onnx", tmp_path / name, Facts(sigma=SIGMA, classes=5, mean=(1,), std=(0.004,)))
        g = SmoothedClassifier.load(tmp_path / name, issuer=SEEDS, options=OPTIONS)
        certified.append(g.certify(np.full((4, 4, 3), 128, np.uint8), PLAN).n)
    assert certified == [100, 100]


def test_a_denoiser_that_returns_another_shape_is_refused(tmp_path: Path) -> None:
    onnx.save(plain(), tmp_path / "net.onnx")
    with pytest.raises(CheckpointError, match=r"returns \[3, 5\] for inputs \[3, 3, 4, 4\]"):
        import_model(tmp_path / "net.onnx", tmp_path / "out", FACTS, denoiser=tmp_path / "net.onnx")
