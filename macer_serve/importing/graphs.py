"""One graph of ours out of foreign ones: normalisation in front, any batch size, our names.

    pixels [batch, C, H, W] -> denoiser -> (x - mean) / std -> network -> logits [batch, classes]

A denoiser reads and returns pixel values, as in denoised smoothing (Salman et al. 2020); f after the denoiser is just
another base classifier.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper, version_converter

from macer_serve.errors import CheckpointError, first_line
from macer_serve.onnx_graph import LOGITS, PIXELS

Shape = tuple[int, int, int]
MAX_BATCH_VALUES = 2**26  # of a batch that a graph fixes, and which a run fills up: 256 MiB


def batch_of(model: Any) -> int | None:
    """Returns the batch size that a graph's input fixes; None if it takes any."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return dims[0].dim_value if len(dims) and dims[0].HasField("dim_value") else None


def require_shape(model: Any, shape: Shape, what: str) -> None:
    """Raise `CheckpointError` unless the graph's input can be `[batch, *shape]`."""
    kind, batch = model.graph.input[0].type.tensor_type, batch_of(model)
    if (batch or 1) * math.prod(shape) > MAX_BATCH_VALUES:
        raise CheckpointError(
            f"the input of {what} is a batch of {batch:,} images: export it with a dynamic batch dimension"
        )
    if not kind.HasField("shape"):
        return
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    if len(sizes) != 4 or any(size not in (None, wanted) for size, wanted in zip(sizes[1:], shape, strict=True)):
        stated = ", ".join("?" if size is None else str(size) for size in sizes)
        raise CheckpointError(f"the input of {what} is [{stated}]; [batch, {', '.join(map(str, shape))}] is needed")


def joined(
    network: Any,
    *,
    shape: Shape,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    denoiser: Any | None = None,
) -> Any:
    """Returns the `onnx.ModelProto` of the whole base classifier, for inputs of `shape` (C, H, W).

    Raises `CheckpointError` if the operator sets of network and denoiser cannot be brought together.
    """
    parts = {"denoiser": denoiser, "network": network} if denoiser is not None else {"network": network}
    opset = max(_opset(part) for part in parts.values())
    nodes: list[Any] = []
    initializers: list[Any] = []
    value = PIXELS
    for name, part in parts.items():
        if name == "network" and (any(mean) or any(s != 1.0 for s in std)):
            for operator, numbers in (("Sub", mean), ("Div", std)):
                constant = f"normalisation/{operator.lower()}"
                array = np.asarray(numbers, np.float32).reshape(1, -1, 1, 1)
                initializers.append(numpy_helper.from_array(array, constant))
                nodes.append(helper.make_node(operator, [value, constant], [constant + "/out"], constant))
                value = constant + "/out"
        inner = compose.add_prefix(_with_any_batch(_converted(part, opset, name)), f"{name}/").graph
        for i, node in enumerate(inner.node):
            node.name = f"{name}/{i}/{node.op_type}"  # quantisation needs names, each its own
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
        nodes.append(helper.make_node("Identity", [value], [inner.input[0].name], f"{name}/input"))
        nodes += inner.node
        initializers += inner.initializer
        value = inner.output[0].name
    nodes.append(helper.make_node("Identity", [value], [LOGITS], "logits"))
    graph = helper.make_graph(
        nodes,
        "base classifier",
        [helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", classes])],
        initializers,
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=max(part.ir_version for part in parts.values()),
        producer_name="macer-serve",
    )


def _with_any_batch(model: Any) -> Any:
    """Returns the graph with each Reshape to its fixed batch size changed to take any. The caller compares logits."""
    batch = batch_of(model)
    if batch is None:
        return model
    model = copy.deepcopy(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    for i, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        sizes = numpy_helper.to_array(constants[node.input[1]]).flatten().tolist()
        if len(sizes) > 1 and sizes[0] == batch:
            sizes[0] = 0 if -1 in sizes else -1  # the input's own, or what is left
            name = f"any batch {i}"
            model.graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
            node.input[1] = name
    return model


def _opset(model: Any) -> int:
    return int(model.opset_import[0].version)


def _converted(model: Any, opset: int, what: str) -> Any:
    """Returns the graph in a newer operator set."""
    if _opset(model) == opset:
        return model
    try:
        return version_converter.convert_version(model, opset)
    except Exception as error:  # the converter's own errors, of many kinds
        raise CheckpointError(
            f"{what} and the other graph use operator sets {_opset(model)} and {opset}, and {what} cannot be "
            f"converted: {first_line(error)}. Export both with one operator set."
        ) from error


def serialised(model: Any) -> bytes:
    """Returns the graph's bytes: the same for the same graph. Raises `CheckpointError` if it is too large for ONNX."""
    try:
        onnx.checker.check_model(model)
        data: bytes = model.SerializeToString(deterministic=True)
    except Exception as error:
        raise CheckpointError(f"the graph is not valid, or too large for ONNX: {first_line(error)}") from error
    return data
