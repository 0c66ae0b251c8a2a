"""BatchedVoter: what all engines have in common.

It has the noise drawn, packs the draws of many requests into passes of a fixed batch size, pads short ones, and counts.
Before it votes it proves that its engine computes the base classifier, and that a copy's logits depend on nothing but
the copy.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from macer_serve.base_classifier import relative_error
from macer_serve.errors import EngineError, ParameterError
from macer_serve.hardware import multiplies_int8
from macer_serve.smoothing.noise import FRACTION_BITS, as_pixels
from macer_serve.smoothing.votes import Draw, Votes
from macer_serve.voters.calls import Call, Calls
from macer_serve.voters.copies import HostCopies
from macer_serve.voters.engines import Engine, EngineName, Logits, Passes
from macer_serve.voters.packing import packed
from macer_serve.voters.tasks import Task

log = logging.getLogger(__name__)

_PROBE_SEED = hashlib.sha256(b"macer-serve probe").digest()[:16]
_COMPARED_COPIES = 16  # copies of the probe whose logits are compared with the plain classifier's
_SETTINGS = 3  # passes that each worker makes of the whole probe
_WARM_UP_S = 900  # a worker that takes longer than this to warm up is stuck
_SATURATED = ". This CPU has no VNNI instructions and adds int8 products with saturation: take precision fp32"
_DEPENDS = (
    "this voter's logits depend on a copy's position in the batch, on its batch or on the worker; its votes could not "
    "be repeated. Try precision fp32, or another batch."
)


class BatchedVoter:
    """Votes of one base classifier by one engine, on a pool of worker threads.

    Warm-up happens in the constructor: the voter is ready, and its `engine` proved, when it returns. `batch_sizes`
    are those of its passes, ascending: the small one serves short decisions, and is left out if its logits differ in a
    single bit. Raises `EngineError` for an engine that computes another function than the plain classifier, or whose
    logits depend on a copy's position, on its batch, or on the worker.
    """

    def __init__(self, name: str, engine: Engine, *, classes: int, passes: Passes) -> None:
        self.classes, self.noise, self.workers = classes, passes.noise, passes.workers
        self.input_shape, self._scale = passes.shape, passes.scale
        self.batch_sizes = passes.batch_sizes
        self._engine, self._local, self._process = engine, threading.local(), os.getpid()
        self._calls = Calls()
        self._source = engine.source or HostCopies(passes.noise, passes.shape)
        self._pool = ThreadPoolExecutor(self.workers, "voter", initializer=self._start_worker)
        try:
            fingerprint = self._warm_up()
        except BaseException:
            self.close()
            raise
        engine.seal()
        self.engine = str(
            EngineName(
                engine=name,
                device=engine.device,
                precision=engine.precision,
                batch=self.batch_sizes[-1],
                fingerprint=fingerprint,
                compiled=engine.compiled,
                build=engine.build,
                noise=self._source.name,
            )
        )
        log.info("voter ready: %s, batch sizes %s, %d workers", self.engine, self.batch_sizes, self.workers)

    def submit(self, tasks: Sequence[Task], turn: float = 0.0, *, small: bool = False) -> Future[list[Votes]]:
        """Returns the votes of each task, hard or soft, when they are counted.

        As many passes as possible are full large ones, or all are small ones, if `small`. Those that wait for a worker
        are made in the order of `turn`, lower ones first; those that have begun are finished. Raises `ParameterError`
        for an input of another shape: NumPy would broadcast it, and its pixels would share their noise.
        """
        if os.getpid() != self._process:
            raise EngineError(
                "this voter was opened before its process was forked, and its threads stayed behind: load the "
                "classifier in each process, or start processes by spawn"
            )
        for task in tasks:
            if task.x.shape != self.input_shape:
                raise ParameterError(f"this voter takes inputs of shape {self.input_shape}, not {task.x.shape}")
        call = Call(tuple(tasks), self.classes, packed(tasks, self.batch_sizes[: 1 if small else None]), turn)
        passes = len(call.waiting)
        self._calls.add(call)
        for _ in range(passes):
            self._pool.submit(self._next_pass)
        return call.votes

    def __reduce__(self) -> NoReturn:
        raise EngineError("a loaded classifier cannot be pickled: load it in each process")

    def close(self) -> None:
        """Let running passes end, drop waiting ones."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._calls.cancel()

    def __enter__(self) -> BatchedVoter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- counting -----------------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        self._engine.start_thread()
        self._local.buffer = self._source.buffer(self.batch_sizes[-1])

    def _next_pass(self) -> None:
        """Makes the pass whose turn it is."""
        if (found := self._calls.next_pass()) is None:
            return
        call, batch = found
        try:
            call.count(batch, self._pass([(call.tasks[i], piece) for i, piece in batch]))
        except BaseException as error:  # whoever waits must hear of it
            call.fail(error)

    def _pass(self, batch: list[tuple[Task, Draw]]) -> Logits:
        """Returns the logits of the pieces' copies, in order, by one pass of the smallest size that holds them."""
        filled = sum(len(draw) for _, draw in batch)
        copies = self._local.buffer[: next(size for size in self.batch_sizes if size >= filled)]
        at = 0
        for task, draw in _joined(batch):
            self._source.fill(copies[at : at + len(draw)], task.x, task.seed, draw.purpose, draw.start)
            at += len(draw)
        copies[filled:] = 0  # nothing of an earlier pass
        logits = self._engine.logits(copies)[:filled]
        if not np.isfinite(logits).all():
            raise EngineError("the network's logits are not finite for this input: it has no class there")
        return logits

    # --- warm-up ------------------------------------------------------------------------------------------------------

    def _warm_up(self) -> str:
        """Returns the engine's fingerprint, 16 hex digits of the logits of the probe batch."""
        probe = self._probe()
        first = self._pool.submit(lambda: [self._engine.logits(probe[:size]).copy() for size in self.batch_sizes])
        self._require_the_plain_function(probe, first.result(_WARM_UP_S)[-1])
        began = time.monotonic()
        outputs = self._on_every_worker(self._in_every_setting, probe)
        self.votes_per_s = _SETTINGS * self.workers * len(probe) / (time.monotonic() - began)
        plain = outputs[0][0]
        if any(not np.array_equal(plain, logits) for settings in outputs for logits in settings):
            raise EngineError(_DEPENDS)
        if len(self.batch_sizes) > 1 and not self._small_batch_agrees(probe, plain):
            log.warning("logits at batch size %d differ in their last bits: it is not used", self.batch_sizes[0])
            self.batch_sizes = self.batch_sizes[-1:]
        return hashlib.sha256(plain.tobytes()).hexdigest()[:16]

    def _probe(self) -> npt.NDArray[Any]:
        """Returns a full batch of noisy copies of a ramp of grey levels: different rows, the same for every replica."""
        ramp = np.arange(int(np.prod(self.input_shape)), dtype=np.int32) % 256
        x = (ramp << FRACTION_BITS).reshape(self.input_shape)
        return self.noise.sample(x, _PROBE_SEED, "selection", 0, self.batch_sizes[-1])

    def _on_every_worker(self, work: Any, probe: npt.NDArray[Any]) -> list[tuple[Logits, ...]]:
        """Returns what `work` returns on each worker thread."""
        ready = threading.Barrier(self.workers)

        def on_one_worker() -> tuple[Logits, ...]:
            ready.wait(timeout=_WARM_UP_S)  # so that each worker takes one of the calls
            return work(probe)  # type: ignore[no-any-return]

        return [done.result() for done in [self._pool.submit(on_one_worker) for _ in range(self.workers)]]

    def _in_every_setting(self, probe: npt.NDArray[Any]) -> tuple[Logits, ...]:
        """Returns the probe's logits computed in order, with rows permuted, and with every second row replaced."""
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(probe))
        kept = np.arange(len(probe)) % 2 == 0
        plain = self._engine.logits(probe).copy()
        permuted = np.empty_like(plain)
        permuted[order] = self._engine.logits(probe[order])
        mixed = self._engine.logits(np.where(kept[:, None, None, None], probe, np.zeros_like(probe))).copy()
        mixed[~kept] = plain[~kept]
        return plain, permuted, mixed

    def _require_the_plain_function(self, probe: npt.NDArray[Any], logits: Logits) -> None:
        """Raise `EngineError` unless the engine's logits are the plain classifier's, but for its arithmetic."""
        copies = probe[:_COMPARED_COPIES]
        pixels = as_pixels(copies, self._scale)
        plain = self._engine.plain_logits(pixels)
        if plain.ndim != 2 or plain.shape != (len(copies), self.classes):
            raise EngineError(
                f"the base classifier must return logits [k, {self.classes}]; for {len(copies)} inputs it returned "
                f"{list(plain.shape)}"
            )
        if not np.isfinite(plain).all():
            raise EngineError("the base classifier's logits are not finite: its weights are damaged, or out of range")
        alone = self._engine.plain_logits(pixels[: len(copies) // 2])
        if relative_error(alone, plain[: len(alone)]) > self._engine.tolerance:
            raise EngineError(_DEPENDS)
        error = relative_error(logits[: len(copies)], plain)
        if error > self._engine.tolerance:
            raise EngineError(
                f"the engine does not compute the base classifier: its logits differ by {error:.2g} of their size, "
                f"which its arithmetic does not explain ({self._engine.tolerance:g} at most)"
                + (_SATURATED if self._engine.precision == "int8" and not multiplies_int8() else "")
            )

    def _small_batch_agrees(self, probe: npt.NDArray[Any], logits: Logits) -> bool:
        """Returns whether the small batch gives the very logits of the large one, on every worker, at both ends."""
        small = self.batch_sizes[0]

        def both_ends(copies: npt.NDArray[Any]) -> tuple[Logits, ...]:
            first = self._engine.logits(copies[:small]).copy()
            return first, self._engine.logits(copies[-small:][::-1])[::-1].copy()

        return all(
            np.array_equal(first, logits[:small]) and np.array_equal(last, logits[-small:])
            for first, last in self._on_every_worker(both_ends, probe)
        )


def _joined(pieces: list[tuple[Task, Draw]]) -> list[tuple[Task, Draw]]:
    """Returns the pieces, with adjacent pieces of one stream joined. Noise is drawn faster in larger pieces."""
    joined: list[tuple[Task, Draw]] = []
    for task, draw in pieces:
        if joined:
            last, before = joined[-1]
            same = last.x is task.x and (last.seed, before.purpose) == (task.seed, draw.purpose)
            if same and before.stop == draw.start:
                joined[-1] = (last, replace(before, stop=draw.stop))
                continue
        joined.append((task, draw))
    return joined
