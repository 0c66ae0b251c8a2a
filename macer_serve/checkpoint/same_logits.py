"""Whether an ONNX graph computes the base classifier that it was made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from macer_serve.base_classifier import SAME, error_of_batch, probe_pixels
from macer_serve.errors import EngineMismatchError
from macer_serve.onnx_graph import PIXELS
from macer_serve.onnx_trial import open_bounded

if TYPE_CHECKING:
    from torch import nn

PROBE_BATCHES = (1, 3)


def require_same_logits(
    graph: bytes, model: nn.Module, input_shape: tuple[int, int, int], sigma: float
) -> npt.NDArray[np.float32]:
    """Returns the logits of a probe of three images. Raises `EngineMismatchError` unless onnxruntime's are torch's.

    The probe is noise of `sigma` on random pixels. Each class is compared on its own scale, see
    `macer_serve.base_classifier.relative_error`. Raises `EngineError` if onnxruntime cannot run the graph.
    """
    import torch

    run = open_bounded(graph, PIXELS)
    pixels = probe_pixels(max(PROBE_BATCHES), input_shape, sigma)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    for batch in PROBE_BATCHES:
        logits: npt.NDArray[np.float32] = run(pixels[:batch])
        error = error_of_batch(logits, expected) if logits.shape[:1] == (batch,) else np.inf
        if error > SAME:
            raise EngineMismatchError(
                f"onnxruntime and torch do not compute the same logits for {batch} probe image(s): a class's differ "
                f"by {error:.2g} of how much they vary, and {SAME:g} is allowed"
            )
    return logits
