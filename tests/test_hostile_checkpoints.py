"""Checkpoint folders that are out of order, or ask for too much: each gets one sentence, before memory is taken."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_checkpoints import DIGEST, edit, lenet
from safetensors.torch import save
from torch import nn

from macer_serve.checkpoint import CheckpointConfig, load_checkpoint, load_config, load_model, resolve, save_checkpoint
from macer_serve.errors import CheckpointError

Saved = tuple[Path, nn.Sequential, CheckpointConfig]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    model, settings = lenet()
    folder = tmp_path / "digits"
    return folder, model, save_checkpoint(model, settings, folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schema_version": 1}, "schema_version 1 is not understood"),
        ({"schema_version": ...}, "schema_version None"),
        ({"sigma": ...}, "sigma"),
        ({"mean": ...}, "mean"),
        ({"files": ...}, "files"),
        ({"surprise": 1}, "unknown fields surprise"),
        ({"sigma": 0.0}, "sigma must lie in"),
        ({"sigma": math.nan}, "sigma must lie in"),
        ({"sigma": "0.25"}, "config.json"),
        ({"std": [0.0]}, "std must be positive"),
        ({"std": [math.nan]}, "finite"),
        ({"mean": [math.inf]}, "finite"),
        ({"std": []}, "one value a channel"),
        ({"mean": 0.5}, "mean must be a list"),
        ({"classes": "0123456789"}, "classes must be a list"),
        ({"classes": ["one"]}, "two classes"),
        ({"input_shape": [28, 28]}, "config.json"),
        ({"input_shape": [2, 28, 28]}, "input_shape"),
        ({"resize": 20}, "resize"),
        ({"files": {"model.safetensors": "sha256:abc"}}, "digest"),
        ({"files": {"model.safetensors": 1}}, "digest"),
        ({"files": {"model.int8.onnx": DIGEST}}, r"files must name model\.safetensors or model\.onnx"),
        ({"files": {"model.safetensors": DIGEST, "../other": DIGEST}}, "only"),
        ({"files": [DIGEST]}, "files must be an object"),
        ({"name": 5}, "name must be text"),
        ({"name": "x" * 201}, "at most 200 characters"),
        ({"name": "\ud800"}, "valid Unicode"),
        ({"architecture": ["lenet"]}, "architecture must be text"),
        ({"classes": [["a"], ["b"]]}, "classes must be a list of names"),
        ({"classes": ["a"] * 100_001}, "2 to 100,000 classes"),
        ({"input_shape": [1, 2**20, 2**20], "resize": 2**20}, "at most 4,194,304 values"),
        ({"input_shape": [1, 28.0, 28]}, "whole numbers"),
        ({"input_shape": [[[1]], 28, 28]}, "whole numbers"),
        ({"input_shape": None}, "input_shape must be a list"),
        ({"mean": [10**400]}, "mean must be a list of numbers"),
        ({"std": [1e300]}, "std in"),
        ({"sigma": True}, "sigma must be a number"),
        ({"sigma": math.inf}, "sigma must lie in"),
        ({"resize": math.inf}, "resize must be a whole number"),
        ({"resize": 2**40}, "resize must be at most"),
        ({"seed": [[]]}, "seed must be a whole number"),
        ({"recipe": "short"}, "recipe must be an object"),
        ({"metrics": {"loss": math.nan}}, "every number must be finite"),
        ({"metrics": {"a": eval("[" * 50 + "]" * 50)}}, "nested too deeply"),
        ({"outputs": ["logits"]}, "outputs must be logits"),
        ({"\ud800": 1}, r"unknown fields .ud800"),
    ],
)
def test_a_configuration_out_of_order_is_refused(saved: Saved, changes: dict[str, Any], named: str) -> None:
    edit(saved[0], **changes)
    with pytest.raises(CheckpointError, match=named):
        load_config(saved[0])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema_version": 1', "\ufeff{}", "[" * 100_000, '{"seed": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:20],
)
def test_damaged_json_is_refused(saved: Saved, text: str) -> None:
    (saved[0] / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError):
        load_config(saved[0])


def test_an_endless_configuration_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="is larger than"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000, "a\0b"])
def test_names_that_can_be_no_folder_are_no_checkpoint(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        resolve(name)


def with_digest(folder: Path, name: str, data: bytes) -> None:
    """Put a file into a checkpoint's folder, its digest properly named."""
    (folder / name).write_bytes(data)
    edit(folder, files={name: "sha256:" + hashlib.sha256(data).hexdigest()})


def test_a_network_too_large_for_its_weights_is_refused_before_memory_is_taken(
    saved: Saved,
) -> None:
    """The first dense layer of a lenet for such images has 6,000,000,000 weights."""
    edit(saved[0], input_shape=[1, 2048, 2048], resize=2048)
    with pytest.raises(CheckpointError, match=r"of another shape are 1\.fc1\.weight"):
        load_model(saved[0])
    edit(saved[0], input_shape=[1, 8, 8], resize=28)
    with pytest.raises(CheckpointError, match="lenet needs images of at least 16x16"):
        load_model(saved[0])


@pytest.mark.parametrize("value", [torch.zeros(10, 500, dtype=torch.int64), torch.full((10, 500), torch.nan)])
def test_weights_that_are_no_finite_numbers_of_the_networks_type_are_refused(saved: Saved, value: torch.Tensor) -> None:
    with_digest(saved[0], "model.safetensors", save({**saved[1].state_dict(), "1.fc.weight": value}))
    with pytest.raises(CheckpointError, match=r"of another type of numbers are 1\.fc\.weight|not finite"):
        load_model(saved[0])


def graph_of(name: str) -> bytes:
    """Returns a graph that asks for another file, for 4 TiB, or for a loop of 2^40 steps."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, kind: int, shape: Any) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    nodes = [helper.make_node("Flatten", ["pixels"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["raw"])]
    weights = {"w": np.zeros((784, 10), np.float32)}
    if name == "memory":
        weights["size"] = np.array([2**40])
        nodes += [
            helper.make_node("ConstantOfShape", ["size"], ["huge"]),
            helper.make_node("ReduceSum", ["huge"], ["sum"], keepdims=0),
            helper.make_node("Add", ["raw", "sum"], ["logits"]),
        ]
    elif name == "loop":
        weights |= {"steps": np.array(2**40), "true": np.array(True)}
        body = helper.make_graph(
            [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Add", ["x", "x"], ["y"])],
            "body",
            [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, None)],
            [value("d", TensorProto.BOOL, []), value("y", TensorProto.FLOAT, None)],
        )
        nodes.append(helper.make_node("Loop", ["steps", "true", "raw"], ["logits"], body=body))
    else:
        nodes.append(helper.make_node("Identity", ["raw"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("pixels", TensorProto.FLOAT, ["batch", 1, 28, 28])],
        [value("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(array, key) for key, array in weights.items()],
    )
    if name == "external":
        weight = graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="../secret.bin")
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return data


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("external", "its weights are in another file"),
        ("loop", "it uses Loop, which may run for any time"),
        ("memory", "its values need more than 4 GiB"),
    ],
)
@pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
def test_a_graph_that_needs_too_much_is_refused_when_it_is_loaded(
    saved: Saved, name: str, words: str, file: str
) -> None:
    folder, graph = saved[0], graph_of(name)
    with_digest(folder, file, graph)
    if file != "model.onnx":
        files = json.loads((folder / "config.json").read_text())["files"]
        edit(folder, files={**files, "model.safetensors": DIGEST})
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(folder)


def test_a_graph_that_runs_is_loaded(saved: Saved) -> None:
    graph = graph_of("plain")
    with_digest(saved[0], "model.onnx", graph)
    edit(saved[0], architecture="onnx")
    assert load_checkpoint(saved[0])[1].onnx == graph
