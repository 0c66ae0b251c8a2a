"""A torch module as a closed graph: its function in eval mode, with weights of its own, and nothing from outside.

A module may call networks that are no part of it, read Python variables, change with its hooks or with its training.
Whatever it reads while it is captured becomes a constant of the graph. From then on nothing but the graph runs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from macer_serve.base_classifier import SAME, error_of_batch, probe_pixels, relative_error
from macer_serve.checkpoint.layers import with_layers
from macer_serve.errors import ParameterError, first_line

Floats = npt.NDArray[np.float32]
Shape = tuple[int, int, int]

PROBE = 3  # images; batches of 1 to 3 are compared
INSTEAD = "Or export it as an ONNX file by other means, and import that file."


def captured(module: nn.Module, input_shape: Shape, sigma: float) -> nn.Module:
    """Returns a graph of the function that a module computes in eval mode, on the CPU, for any number of images.

    The graph maps float32 pixel values `[k, C, H, W]` to what the module returns. On a probe, noise of `sigma` on
    random images, its logits are those of the module. The module is left as it was: mode, attributes, weights, buffers.

    Raises `ParameterError` for a module that cannot be captured, does not return a float32 tensor `[k, classes]`, gives
    other logits when it is run again, or whose logits of an image depend on the batch.
    """
    net = getattr(module, "_orig_mod", module)  # within what torch.compile returns
    _require_float32(net)
    device = next((tensor.device for tensor in _tensors(net).values()), torch.device("cpu"))
    pixels = probe_pixels(PROBE, input_shape, sigma)
    with _left_as_it_was(net), torch.no_grad():
        _run_as_python(net)
        logits = _logits(net, pixels, device)
        _require_function(net, pixels, device, logits)
        program = _exported(net, torch.from_numpy(pixels).to(device))
    graph = _closed(program)
    _require_same(graph, pixels, device, logits)
    if device.type == "cpu":
        return graph
    from torch.export.passes import move_to_device_pass

    return _closed(move_to_device_pass(program, "cpu"))


def _exported(net: nn.Module, example: Tensor) -> Any:
    """Returns what torch.export makes of a module. Raises `ParameterError`."""
    batch = ({0: torch.export.Dim("batch")},)
    refused: Exception | None = None
    # The second way follows Python's bytecode, and len(x) in it. The first runs the module as Python does.
    for strict in (False, True):
        try:
            with _silent():
                return torch.export.export(_Pixels(net), (example,), dynamic_shapes=batch, strict=strict)
        except Exception as error:  # of many kinds
            refused = refused or error
    assert refused is not None
    raise ParameterError(_reason(refused)) from refused


def _closed(program: Any) -> nn.Module:
    """Returns the graph of an exported program as a module, with copies of its weights, in eval mode."""
    unlifted = program.module(check_guards=False)
    return with_layers(copy.deepcopy(fx.GraphModule(unlifted, unlifted.graph))).requires_grad_(False).eval()


def _require_same(graph: nn.Module, pixels: Floats, device: torch.device, logits: Floats) -> None:
    """Raise `ParameterError` unless the graph gives the module's logits of the probe, and keeps its tensors."""
    state = {name: tensor.clone() for name, tensor in _tensors(graph).items()}
    for batch in range(1, PROBE + 1):
        if (error := error_of_batch(_logits(graph, pixels[:batch], device), logits)) > SAME:
            raise ParameterError(
                f"the captured graph of the module gives other logits than the module for {batch} image(s): a class's "
                f"differ by {error:.2g} of how much they vary, and {SAME:g} is allowed. {INSTEAD}"
            )
    if changed := [name for name, tensor in _tensors(graph).items() if not torch.equal(tensor, state[name])]:
        raise ParameterError(_changes(changed[0]))


class _Pixels(nn.Module):
    """A module that does not change its input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Any:
        return self.net(pixels.clone())


def _reason(error: Exception) -> str:
    """Returns in words why torch.export cannot capture a module."""
    text = str(error)
    if "Constraints violated" in text:
        why = (
            "its forward fixes the number of images, or decides by it. It must take any number: write x.flatten(1) or "
            "x.reshape(len(x), -1) for x.reshape(2, -1)"
        )
    elif "data-dependent" in text or "Could not guard" in text:
        why = "its forward decides by the values of pixels. Write the decision with torch.where"
    else:
        why = f"torch.export says: {first_line(error)}"
    return f"the module cannot be captured as a graph: {why}. {INSTEAD}"


def _changes(name: str) -> str:
    return (
        f"the module changes its tensor {name} while it runs: it is no function of its input. Batch normalisation in "
        f"training mode does so, and counters. {INSTEAD}"
    )


def _require_float32(net: nn.Module) -> None:
    if isinstance(net, torch.jit.ScriptModule):
        raise ParameterError(f"a module of TorchScript cannot be captured: give the module it was made of. {INSTEAD}")
    for name, tensor in net.named_parameters():
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ParameterError(f"the module's weight {name} has no values yet: load its weights, or run it once")
        if tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            remedy = ": give copy.deepcopy(module).float()" if tensor.is_floating_point() else f". {INSTEAD}"
            raise ParameterError(f"the module's weight {name} is {kind}, and float32 is needed{remedy}")


def _require_function(net: nn.Module, pixels: Floats, device: torch.device, logits: Floats) -> None:
    """Raise `ParameterError` unless the module returns the same logits again, and for fewer images."""
    again = _logits(net, pixels, device)
    if not np.array_equal(again, logits) and (device.type == "cpu" or relative_error(again, logits) > SAME):
        raise ParameterError(
            "the module gives other logits when it is run again: it draws random numbers, or remembers earlier inputs. "
            "It must be a function of its input alone, in eval mode."
        )
    for batch in range(1, PROBE):
        if (error := error_of_batch(_logits(net, pixels[:batch], device), logits)) > SAME:
            raise ParameterError(
                f"the module's logits of an image depend on the batch: in one of {batch} they differ by {error:.2g} "
                f"of how much they vary from those in one of {PROBE}. They must depend on the image alone."
            )


def _logits(net: nn.Module, pixels: Floats, device: torch.device) -> Floats:
    """Returns a module's logits `[k, classes]` of pixels `[k, C, H, W]`. Raises `ParameterError` for anything else."""
    try:
        with torch.no_grad():
            output = net(torch.from_numpy(pixels.copy()).to(device))
    except Exception as error:  # whatever a module raises
        raise ParameterError(
            f"the module cannot be run on float32 inputs {list(pixels.shape)}: {first_line(error)}"
        ) from error
    if not isinstance(output, Tensor):
        raise ParameterError(
            f"the module returns a {type(output).__name__}; a tensor of logits [k, classes] is needed: wrap it in a "
            "module that returns the logits alone"
        )
    if output.dtype != torch.float32:
        kind = str(output.dtype).removeprefix("torch.")
        raise ParameterError(f"the module returns {kind}; float32 logits [k, classes] are needed")
    if output.ndim != 2 or len(output) != len(pixels):
        raise ParameterError(
            f"the module returns {list(output.shape)} for {len(pixels)} image(s); [{len(pixels)}, classes] is needed"
        )
    logits: Floats = output.detach().cpu().numpy().copy()
    if not np.isfinite(logits).all():
        raise ParameterError("the module returns values that are not finite: its weights are damaged, or out of range")
    return logits


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Returns the weights and the buffers of a module by name, the buffers that are not saved included."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


@contextlib.contextmanager
def _left_as_it_was(net: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode, and everything back at the end: mode, attributes, weights, buffers.

    Raises `ParameterError` if a run of the module has changed its weights or buffers.
    """
    own = [(layer, dict(vars(layer))) for layer in net.modules()]
    tables = [(value, dict(value)) for _, values in own for value in values.values() if isinstance(value, dict)]
    tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in _tensors(net).items()}
    training = net.training
    net.eval()
    versions = {name: _version(tensor) for name, (tensor, _) in tensors.items()}
    try:
        yield
        if changed := [name for name, (tensor, _) in tensors.items() if _version(tensor) != versions[name]]:
            raise ParameterError(_changes(changed[0]))
    finally:
        net.train(training)  # a module may do more in it than to set the mode
        for layer, values in own:
            vars(layer).clear()
            vars(layer).update(values)
        for table, content in tables:
            table.clear()
            table.update(content)
        with torch.no_grad():
            for tensor, before in tensors.values():
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


def _version(tensor: Tensor) -> int:
    """Returns how often a tensor was changed in place; 0 for those of inference mode, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _run_as_python(net: nn.Module) -> None:
    """Drops what `Module.compile` compiled, whose code cannot be captured; `_left_as_it_was` puts it back."""
    for layer in net.modules():
        layer._compiled_call_impl = None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps torch from printing and logging why it cannot capture a module: the error says it."""
    loggers = [logging.getLogger(name) for name in ("torch", *logging.root.manager.loggerDict) if name[:5] == "torch"]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    for handler in handlers:
        handler.addFilter(_nothing)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
