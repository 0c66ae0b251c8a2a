"""The base classifier: a function from pixel values to logits, in the forms that engines run.

Contract: `[k, C, H, W]` float32, pixel values in [0, 1] plus noise, to logits `[k, classes]`. Normalisation is part of
the function. Row i of the logits depends on row i of the input only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from macer_serve.errors import EngineError

if TYPE_CHECKING:
    from torch import nn

SAME = 1e-3  # of `relative_error`, between two engines in fp32; every architecture was seen within 3e-4


@dataclass(frozen=True, slots=True)
class BaseClassifier:
    """A base classifier of `input_shape` (C, H, W) and `classes`, as a torch module, an ONNX graph, or both.

    `load_module` returns the module in eval mode. It is a function, so that an engine that runs a file need not import
    torch. `onnx` is an fp32 graph and `int8` its quantised form; both map `pixels` to `logits` at any batch size.
    """

    input_shape: tuple[int, int, int]
    classes: int
    load_module: Callable[[], nn.Module] | None = None
    onnx: bytes | None = None
    int8: bytes | None = None

    @classmethod
    def of_module(cls, module: nn.Module, *, input_shape: tuple[int, int, int], classes: int) -> BaseClassifier:
        """Returns the base classifier that a copy of `module` computes in eval mode.

        The module must hold all that it computes with, as networks by name do. A user's module may not: it is captured
        first, see `macer_serve.checkpoint.capture`.
        """
        frozen = copy.deepcopy(module).eval()
        return cls(input_shape, classes, load_module=lambda: frozen)

    def module(self) -> nn.Module:
        """Returns the torch module. Raises `EngineError` if the classifier has none."""
        if self.load_module is None:
            raise EngineError("this base classifier is an ONNX graph: the torch engine cannot run it, use onnx")
        return self.load_module()

    def graph(self) -> bytes:
        """Returns the fp32 ONNX graph, exported from the module if the classifier has no file of it.

        Raises `EngineError` if torch cannot export the module.
        """
        if self.onnx is not None:
            return self.onnx
        from macer_serve.onnx_graph import export_graph

        graph: bytes = export_graph(self.module(), self.input_shape).SerializeToString(deterministic=True)
        return graph

    def int8_graph(self) -> bytes:
        """Returns the quantised graph. Raises `EngineError` if there is none."""
        if self.int8 is None:
            raise EngineError("int8 needs a quantised file, and this checkpoint has none: run macer quantize on it")
        return self.int8


def probe_pixels(batch: int, input_shape: tuple[int, int, int], sigma: float) -> npt.NDArray[np.float32]:
    """Returns inputs such as a base classifier sees, `[batch, C, H, W]`: random 8-bit pixels under Gaussian noise.

    Row i is the same for every batch size.
    """
    rows = []
    for i in range(batch):
        generator = np.random.Generator(np.random.PCG64(i))
        rows.append(generator.integers(0, 256, input_shape) / 255 + sigma * generator.standard_normal(input_shape))
    return np.stack(rows).astype(np.float32)


def kind_of_outputs(outputs: npt.NDArray[Any]) -> Literal["logits", "probabilities"]:
    """Returns `probabilities` if every row of `[k, classes]` is a distribution, as after a softmax; else `logits`."""
    distributions = bool((outputs >= 0).all()) and bool((np.abs(outputs.sum(1) - 1.0) < 1e-3).all())
    return "probabilities" if distributions else "logits"


def relative_error(logits: npt.NDArray[np.float32], plain: npt.NDArray[np.float32]) -> float:
    """Returns the largest error of a class's logits, relative to how much they vary; infinite if one is not finite.

    Each class has a scale of its own: the standard deviation of its plain logits over the rows `[k, classes]`, at
    least a tenth of the median class's and 1e-5 of their size. A logit of -1e9 (a masked class) or an offset common to
    all classes hides no difference of the others.
    """
    if logits.shape != plain.shape or not (np.isfinite(logits).all() and np.isfinite(plain).all()):
        return float("inf")
    exact = plain.astype(np.float64)
    spread = exact.std(0)
    scale = np.maximum(np.maximum(spread, 0.1 * np.median(spread)), 1e-5 * np.abs(exact).max(0))
    error = np.sqrt(np.mean((logits.astype(np.float64) - exact) ** 2, axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(error == 0.0, 0.0, error / scale)
    return float(relative.max())


def error_of_batch(logits: npt.NDArray[np.float32], plain: npt.NDArray[np.float32]) -> float:
    """Returns the `relative_error` of the logits of the first images. The scale is that of all plain logits.

    A batch of one has no scale of its own.
    """
    logits, plain = np.atleast_1d(logits), np.atleast_1d(plain)
    if len(logits) > len(plain) or logits.shape[1:] != plain.shape[1:]:
        return float("inf")
    return relative_error(np.concatenate([logits, plain[len(logits) :]]), plain)
