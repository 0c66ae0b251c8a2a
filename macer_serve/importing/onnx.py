"""ONNX files: vetted, whole in memory, and with the input's shape if the file states it.

The importer refuses external data outside the file's own folder, operators of other domains than ONNX's own (they need
code), operator sets that onnxruntime does not run, weights that are not finite, and more than one input or output.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TensorShapeProto, helper, numpy_helper

from macer_serve.checkpoint.limits import MAX_BYTES, parse_json, read_bytes
from macer_serve.checkpoint.state_dict import named
from macer_serve.errors import CheckpointError, first_line
from macer_serve.importing.facts import Facts
from macer_serve.importing.foreign import Foreign
from macer_serve.onnx_graph import graphs_of, reason_to_refuse, tensors_of

_OLDEST_IR = 8  # older files list their weights as inputs
OLDEST_OPSET = 7  # before it, operators broadcast by an attribute
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")


def matches(path: Path, arch: str | None) -> bool:
    return path.suffix == ".onnx" and arch is None


def read(path: Path, arch: str | None) -> Foreign:
    """Returns the graph, and the facts in the metadata of a file that `macer export` wrote."""
    model = load_graph(path)
    stated = {p.key: p.value for p in model.metadata_props}
    facts = Facts(input_shape=_static_shape(model.graph))
    if stated.get("macer_format") == "1":
        try:
            facts = Facts(
                sigma=float(parse_json(stated["sigma"])),
                classes=tuple(map(str, parse_json(stated["classes"]))),
                input_shape=_static_shape(model.graph),
                value_range=(0.0, 1.0),
                resize=int(parse_json(stated["resize"])),
                name=stated["name"],
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: its metadata are not those that macer export writes: {first_line(error)}"
            ) from error
    return Foreign("onnx", facts, model)


def load_graph(path: Path) -> Any:
    """Returns the `onnx.ModelProto` of a file, external data within its folder included.

    It has one fp32 input and one output. Raises `CheckpointError` for a file that is damaged or refused; the module's
    docstring says which are.
    """
    data = read_bytes(path)
    try:
        model: Any = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own errors
        raise CheckpointError(f"{path} is not an ONNX file: {first_line(error)}") from error
    tensors = list(tensors_of(model.graph))
    _inline_external_data(path, tensors)
    graph = model.graph
    kept = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in kept]
    del graph.input[:]
    graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, _OLDEST_IR)
    _require_one_input_and_output(path, graph)
    _require_standard_operators(path, model)
    if reason := reason_to_refuse(model):
        raise CheckpointError(f"{path} is refused: {reason}")
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise CheckpointError(f"{path} is no valid ONNX graph: {first_line(error)}") from error
    _require_finite(path, tensors, {name for node in _nodes(graph) if node.op_type in _WEIGHTED for name in node.input})
    return model


def _nodes(graph: Any) -> Iterator[Any]:
    return (node for inner in graphs_of(graph) for node in inner.node)


def _inline_external_data(path: Path, tensors: list[Any]) -> None:
    """Read tensors that lie in other files of the same folder. Raises `CheckpointError` for any other place."""
    folder = path.parent.resolve()
    total = path.stat().st_size
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        try:
            file = (folder / location).resolve()  # follows links, too
            offset = int(entries.get("offset", 0))
            size = file.stat().st_size if file.is_file() else -1
            length = int(entries.get("length", max(0, size - offset)))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: external data of {tensor.name!r} cannot be read: {error}") from error
        if not file.is_relative_to(folder) or Path(location).is_absolute():
            raise CheckpointError(f"{path}: its weights lie outside its folder, in {location!r}: this is refused")
        if size < 0 or length < 0 or offset < 0 or offset + length > size:
            raise CheckpointError(f"{path}: external data {location!r} are missing, or shorter than the file states")
        if (total := total + length) > MAX_BYTES:
            raise CheckpointError(f"{path}: its external data are larger than {MAX_BYTES:,} bytes")
        with file.open("rb") as handle:
            handle.seek(offset)
            tensor.raw_data = handle.read(length)
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _require_one_input_and_output(path: Path, graph: Any) -> None:
    for what, values in (("inputs", graph.input), ("outputs", graph.output)):
        if len(values) != 1:
            raise CheckpointError(
                f"{path} has {len(values)} {what} ({named([v.name for v in values])}); a classifier has one: pixels "
                "in, logits out"
            )
    kind = graph.input[0].type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else kind
        raise CheckpointError(f"{path}: its input is {name}; float32 pixel values are needed")
    for value in (graph.input[0], graph.output[0]):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 1:  # as some exporters write an unknown size
                dim.Clear()
    for value, rank in ((graph.input[0], 4), (graph.output[0], 2)):
        if not value.type.tensor_type.HasField("shape"):  # what it must be, each size unknown
            value.type.tensor_type.shape.dim.extend(TensorShapeProto.Dimension() for _ in range(rank))


def _require_standard_operators(path: Path, model: Any) -> None:
    """Raise `CheckpointError` for operators that ONNX itself does not define; drop domains that no node uses."""
    foreign = sorted({f"{n.domain}:{n.op_type}" for n in _nodes(model.graph) if n.domain not in ("", "ai.onnx")})
    if foreign:
        raise CheckpointError(
            f"{path} uses operators that ONNX does not define: {named(foreign)}. Export it with ONNX's own operators, "
            "functions inlined."
        )
    version = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if version < OLDEST_OPSET:
        raise CheckpointError(f"{path} uses operator set {version}; at least {OLDEST_OPSET} is needed: export it again")
    for node in _nodes(model.graph):
        node.ClearField("domain")
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", version))
    del model.functions[:]
    del model.training_info[:]


def _require_finite(path: Path, tensors: list[Any], weights: set[str]) -> None:
    """Raise `CheckpointError` for nan anywhere, and for infinite weights; an attention's mask may be infinite."""
    for tensor in tensors:
        if tensor.data_type not in _FLOATS:
            continue
        try:
            values = numpy_helper.to_array(tensor)
        except Exception as error:  # its sizes and its data contradict each other
            raise CheckpointError(f"{path}: the tensor {tensor.name!r} is damaged: {error}") from error
        if np.isnan(values).any() or (tensor.name in weights and np.isinf(values).any()):
            raise CheckpointError(f"{path}: {tensor.name} has values that are not finite; the network is damaged")


def _static_shape(graph: Any) -> tuple[int, int, int] | None:
    """Returns C, H, W of the input if the graph fixes all of them."""
    kind = graph.input[0].type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
    return (sizes[1], sizes[2], sizes[3]) if len(sizes) == 4 and min(sizes[1:]) > 0 else None
