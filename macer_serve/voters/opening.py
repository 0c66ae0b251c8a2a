"""From a base classifier and options to a voter that is ready."""

from __future__ import annotations

import logging

from macer_serve.base_classifier import BaseClassifier
from macer_serve.errors import EngineError
from macer_serve.hardware import usable_cores
from macer_serve.smoothing.noise import NoiseKind, noise_for
from macer_serve.voters.batched import BatchedVoter
from macer_serve.voters.engines import Passes, choose, open_engines
from macer_serve.voters.options import VoterOptions

log = logging.getLogger(__name__)

SMALLEST_BATCH = 16  # at a batch of one, engines take other kernels, with other last bits


def open_voter(
    classifier: BaseClassifier,
    *,
    sigma: float,
    noise: NoiseKind = "exact",
    options: VoterOptions | None = None,
) -> BatchedVoter:
    """Returns a voter of the classifier, warmed up, under noise of `sigma` in pixel values.

    If the fastest variant of the engine cannot be used, the next one is taken, and a warning says why. Raises
    `EngineError` if none can.
    """
    chosen = choose(classifier, options or VoterOptions())
    stream = noise_for(noise, sigma)
    channels, height, width = classifier.input_shape
    passes = Passes(
        shape=(height, width, channels),
        noise=stream,
        batch_sizes=_batch_sizes(chosen, height * width),
        workers=(chosen.workers or usable_cores()) if chosen.device == "cpu" else 1,
    )
    failed: EngineError | None = None
    for engine in open_engines(classifier, chosen, passes):
        if failed is not None:
            log.warning("%s: running a plainer variant of the engine, slower", failed)
        try:
            return BatchedVoter(chosen.engine, engine, classes=classifier.classes, passes=passes)
        except EngineError as error:
            failed = error
    assert failed is not None
    raise failed


def default_batch(device: str, pixels: int) -> int:
    """Returns the copies per pass that fill a device, for inputs of so many pixels (height x width).

    It is fixed by device and input size, so that replicas agree. A CPU core takes 10 to 150 ms per pass.
    """
    small_input = pixels <= 64 * 64
    if device == "cpu":
        return 256 if small_input else 16
    return 4096 if small_input else 512


def _batch_sizes(options: VoterOptions, pixels: int) -> tuple[int, ...]:
    """Returns the copies per pass: one size that fills the hardware, and a small one for short decisions."""
    device = options.device or "cpu"
    large = options.batch or default_batch(device, pixels)
    small = max(SMALLEST_BATCH, large // (4 if device == "cpu" else 16))
    return (small, large) if small < large else (large,)
