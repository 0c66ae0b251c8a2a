"""ONNX graphs of base classifiers: exported from torch, and given the input that the noise makes.

A graph of ours maps `pixels` `[batch, C, H, W]` float32 to `logits` `[batch, classes]`, at any batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from macer_serve.errors import EngineError, first_line

if TYPE_CHECKING:
    from torch import nn

PIXELS, LOGITS, COPIES = "pixels", "logits", "copies"
OPSET = 18  # the oldest that torch's exporter writes without conversion, hence read by the most runtimes


def export_graph(module: nn.Module, input_shape: tuple[int, int, int]) -> Any:
    """Returns the `onnx.ModelProto` of a base classifier: the same bytes whenever torch writes the same graph.

    Raises `EngineError` if torch cannot export the module.
    """
    import torch

    try:
        program = torch.onnx.export(
            module,
            (torch.zeros(2, *input_shape),),  # two images: torch takes a batch of one for a constant
            dynamo=True,
            input_names=[PIXELS],
            output_names=[LOGITS],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            verbose=False,
        )
    except Exception as error:  # the exporter raises errors of many kinds
        raise EngineError(f"torch cannot export this network as ONNX: {first_line(error)}") from error
    assert program is not None
    proto: Any = program.model_proto
    graph = proto.graph
    # The exporter's notes name the source line of every node, with the paths of this machine.
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return proto


NO_FUNCTION = "it draws random numbers, or takes a scale over the batch, so that votes could not be repeated"
_NO_FUNCTIONS = {
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
}
_LOOPS = {"Loop", "Scan", "SequenceMap"}


def graphs_of(graph: Any) -> Iterator[Any]:
    """Yields the graph and the graphs within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs_of(inner)


def tensors_of(graph: Any) -> Iterator[Any]:
    """Yields every dense tensor that the graph holds, those in attributes included."""
    for inner in graphs_of(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def reason_to_refuse(model: Any) -> str | None:
    """Returns why an `onnx.ModelProto` is not run, whatever its logits; None if nothing speaks against it.

    Another file may hold anything by the time it is read, a loop may never end on some images, and a sparse tensor
    may have any size.
    """
    from onnx import TensorProto

    if wrong := no_functions_in(model.graph):
        return f"it uses {', '.join(wrong)}: {NO_FUNCTION}"
    if loops := sorted({node.op_type for part in graphs_of(model.graph) for node in part.node} & _LOOPS):
        return f"it uses {', '.join(loops)}, which may run for any time: export it with its loops unrolled"
    if model.functions:
        return "it defines functions: export it with its functions inlined"
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors_of(model.graph)):
        return "its weights are in another file: save it with its weights in it"
    if any(
        part.sparse_initializer
        or any(a.HasField("sparse_tensor") or a.sparse_tensors for node in part.node for a in node.attribute)
        for part in graphs_of(model.graph)
    ):
        return "it has sparse tensors: export it with dense weights"
    return None


def no_functions_in(graph: Any) -> list[str]:
    """Returns the operators in a graph that make its logits depend on the batch or on chance, by name."""
    return sorted({node.op_type for part in graphs_of(graph) for node in part.node} & _NO_FUNCTIONS)


def with_copies(graph: bytes, shape: tuple[int, int, int], scale: float, *, integers: bool) -> bytes:
    """Returns the graph with the input `copies` `[batch, H, W, C]` in place of `pixels`: pixels = copies * scale.

    `copies` is int16 (lattice steps) or float32, as the noise draws them, so that a pass needs no conversion outside
    the engine. `shape` is (H, W, C). Raises `EngineError` if the graph has another input or output than ours.
    """
    import onnx
    from onnx import TensorProto, helper

    try:
        model = onnx.load_from_string(graph)
    except Exception as error:  # protobuf's own errors
        raise EngineError(f"the ONNX file cannot be read: {error}") from error
    inner = model.graph
    if wrong := no_functions_in(inner):
        raise EngineError(f"the graph uses {', '.join(wrong)}: {NO_FUNCTION}")
    names = [value.name for value in inner.input], [value.name for value in inner.output]
    if names != ([PIXELS], [LOGITS]):
        raise EngineError(f"the ONNX graph maps {names[0]} to {names[1]}; {PIXELS} to {LOGITS} is needed")
    kind = TensorProto.INT16 if integers else TensorProto.FLOAT
    front = [
        helper.make_node("Cast", [COPIES], ["copies_as_floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["copies_as_floats", "lattice_step"], ["copies_as_pixels"]),
        helper.make_node("Transpose", ["copies_as_pixels"], [PIXELS], perm=[0, 3, 1, 2]),
    ]
    nodes = [*front, *inner.node]
    del inner.node[:]
    inner.node.extend(nodes)
    inner.initializer.append(helper.make_tensor("lattice_step", TensorProto.FLOAT, [], [scale]))
    del inner.input[:]
    inner.input.append(helper.make_tensor_value_info(COPIES, kind, ["batch", *shape]))
    data: bytes = model.SerializeToString(deterministic=True)
    return data
