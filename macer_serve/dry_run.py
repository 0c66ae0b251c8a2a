"""A network's shapes without its arithmetic: whether it takes inputs of a given shape, in milliseconds."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call


def output_shape(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the network's output for an input of `shape`, in the mode (train, eval) that it is in.

    The network and its buffers stay as they are: the run is on torch's meta device. Raises whatever the network raises
    for inputs of this shape.
    """
    tensors = {name: value.to("meta") for name, value in (*network.named_parameters(), *network.named_buffers())}
    with torch.no_grad():
        output: torch.Tensor = functional_call(network, tensors, (torch.empty(shape, device="meta"),))
    return tuple(output.shape)
