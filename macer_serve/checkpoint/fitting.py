"""A state dict and the network that it is for: what does not fit is named before memory for the weights is taken."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from macer_serve.checkpoint.state_dict import named
from macer_serve.errors import CheckpointError

_COUNTER = "num_batches_tracked"  # absent from files before PyTorch 0.4.1
_MISMATCH = re.compile(r"size mismatch for (\S+):")


def load_weights(network: nn.Module, state: Mapping[str, Tensor], named_there: Callable[[str], str] = str) -> str:
    """Gives the network the tensors; returns in words which do not fit, and nothing if all do.

    On the meta device this only compares. `named_there` maps the network's names to those of the file.
    """
    own = network.state_dict()
    common = [(name, own[name], given) for name, given in state.items() if name in own]
    # Indices that an architecture fixes are not the file's to choose.
    fixed = [(n, o, g) for n, o, g in common if not (o.is_floating_point() or o.is_meta or n.endswith(_COUNTER))]
    problems: dict[str, list[str]] = {
        "of another type of numbers are": [n for n, o, g in common if o.is_floating_point() != g.is_floating_point()]
        + [n for n, g in state.items() if not (n in own or g.is_floating_point() or n.endswith(_COUNTER))],
        "of other values than the architecture's are": [n for n, o, g in fixed if not torch.equal(o, g.to(o.dtype))],
    }
    if not any(problems.values()):
        try:
            with warnings.catch_warnings(action="ignore"):  # that a copy to the meta device does nothing
                missing, unknown = network.load_state_dict(state, strict=False)
            mismatched = []
        except RuntimeError as error:
            if not (mismatched := _MISMATCH.findall(str(error))):
                raise
            missing, unknown = ([n for n in a if n not in b] for a, b in ((own, state), (state, own)))
        problems["missing are"] = [name for name in missing if not name.endswith(_COUNTER)]
        problems["unknown are"] = unknown
        problems["of another shape are"] = mismatched
    return "; ".join(f"{words} {named(map(named_there, names))}" for words, names in problems.items() if names)


def loaded(
    empty: nn.Module,
    build: Callable[[], nn.Module],
    state: Mapping[str, Tensor],
    what: str,
    named_there: Callable[[str], str] = str,
) -> nn.Module:
    """Returns the network that `build` makes, with the weights, in eval mode.

    `empty` is the same network on the meta device. Raises `CheckpointError` naming the tensors that do not fit.
    """
    if wrong := load_weights(empty, state, named_there):
        raise CheckpointError(f"{what}: {wrong}")
    network = build()
    if wrong := load_weights(network, state, named_there):
        raise CheckpointError(f"{what}: {wrong}")
    return network.eval()


def head_tensors(network: nn.Module) -> list[str]:
    """Returns the names of the weight and the bias of the network's last layer, whose outputs are the classes."""
    last = [name for name, module in network.named_modules() if isinstance(getattr(module, "weight", None), Tensor)][-1]
    return [f"{last}.{name}" for name, _ in network.get_submodule(last).named_parameters(recurse=False)]
