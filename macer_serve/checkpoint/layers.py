"""Layers of a captured graph: torch's operators on weights become torch's modules again.

Engines know modules: they fold batch normalisation into the convolution before it, and keep the last linear layer in
fp32. The function stays the same, operator by operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten


def with_layers(graph: fx.GraphModule) -> fx.GraphModule:
    """Returns the graph, changed: constants are computed, and operators on weights that are used once are modules."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if not node.all_input_nodes and isinstance(node.target, torch._ops.OpOverload):
            _replace_by_constant(graph, node)
        elif node.target in _LAYERS:
            _replace_by_layer(graph, node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return fx.GraphModule(graph, graph.graph)  # without the attributes that no node uses any more


def _replace_by_constant(graph: fx.GraphModule, node: fx.Node) -> None:
    """Put a tensor that depends on no input, such as positions, among the buffers, which follow the graph's device."""
    assert callable(node.target)
    value = node.target(*node.args, **node.kwargs)
    if isinstance(value, Tensor):
        name = f"constant_{node.name}"
        graph.register_buffer(name, value)
        _replace(graph, node, "get_attr", name, ())


def _replace_by_layer(graph: fx.GraphModule, node: fx.Node) -> None:
    arguments = list(node.args)
    weights: list[Any] = []
    for value in arguments[1 : _WEIGHTS[node.target]]:
        if value is not None and not (isinstance(value, fx.Node) and value.op == "get_attr" and len(value.users) == 1):
            return  # computed, or shared with another layer
        weights.append(None if value is None else _attribute(graph, str(value.target)))
    layer = _LAYERS[node.target](node, weights, arguments[_WEIGHTS[node.target] :])
    if layer is not None and not node.kwargs:
        name = f"layer_{node.name}"
        graph.add_submodule(name, layer.eval())
        _replace(graph, node, "call_module", name, (arguments[0],))


def _replace(graph: fx.GraphModule, node: fx.Node, op: str, name: str, arguments: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(node):
        new = graph.graph.create_node(op, name, arguments)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _attribute(graph: fx.GraphModule, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    value: Tensor = getattr(graph.get_submodule(owner), attribute)
    return value


def _linear(node: fx.Node, weights: list[Any], rest: list[Any]) -> nn.Module:
    weight, bias = (*weights, None)[:2]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _given(layer, weight=weight, bias=bias)


def _conv2d(node: fx.Node, weights: list[Any], rest: list[Any]) -> nn.Module:
    weight, bias = (*weights, None)[:2]
    defaults: list[Any] = [[1, 1], [0, 0], [1, 1], 1]
    stride, padding, dilation, groups = rest + defaults[len(rest) :]
    layer = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        groups,
        bias=bias is not None,
        device="meta",
    )
    return _given(layer, weight=weight, bias=bias)


def _batch_norm(node: fx.Node, weights: list[Any], rest: list[Any]) -> nn.Module | None:
    training, momentum, eps, _ = rest
    if training or node.meta["val"].ndim != 4 or any(value is None for value in weights):
        return None
    layer = nn.BatchNorm2d(len(weights[0]), eps, momentum, device="meta")
    names = ("weight", "bias", "running_mean", "running_var")
    layer.num_batches_tracked = None
    return _given(layer, **dict(zip(names, weights, strict=True)))


def _pair(values: list[int]) -> tuple[int, int]:
    return (values[0], values[-1])


def _given(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """Returns the layer with these tensors for its own."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(layer, name, tensor if name.startswith("running") else nn.Parameter(tensor, requires_grad=False))
    return layer


# What makes a layer of an operator, and the index of its first argument that is no weight.
_LAYERS: dict[Any, Any] = {
    aten.linear.default: _linear,
    aten.conv2d.default: _conv2d,
    aten.batch_norm.default: _batch_norm,
}
_WEIGHTS: dict[Any, int] = {aten.linear.default: 3, aten.conv2d.default: 3, aten.batch_norm.default: 5}
