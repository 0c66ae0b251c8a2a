"""Certifying the images of a data set on the workers of a Ray cluster, one image per worker at a time.

Noise depends on the image, the model and the seed alone, so a row is the same whichever worker computes it. Rows come
in the order of the images. A worker is an actor with a voter of its own. If one is lost, its image goes to the next
free worker, and a new worker takes its place.

This is a pool of actors, not Ray Data: Ray Data retries whole blocks, decides itself how far it runs ahead, and starts
the stage again for a lost actor, while the few lines below lose one image. The checkpoint and the data set must have
the same path on all machines.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from macer_serve.datasets import load_dataset
from macer_serve.errors import ClusterError, EngineMismatchError, MacerError, first_line
from macer_serve.evaluation.certify import certified_row, issuer_of
from macer_serve.evaluation.logs import Row
from macer_serve.ray_cluster import absolute, share_of
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.noise import NoiseKind
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions

log = logging.getLogger(__name__)

# An image that was lost with so many workers is not tried again, and so many losses of each worker without a finished
# image end the run.
MOST_LOSSES = 3
# Images per worker that may be finished before an earlier image is. An interruption loses at most these.
AHEAD = 256
# Seconds after which a user is told that no worker is ready.
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """What all workers need to know: the classifier, the data set (test split), and how images are certified."""

    checkpoint: str
    dataset: str
    data_dir: Path
    split: float | None
    noise: NoiseKind
    seed: str
    key: Path | None
    coarse: bool
    plan: Plan
    options: VoterOptions


class Worker:
    """An actor: one voter, and the data set. It is opened by a call, whose errors keep their type."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def open(self) -> str:
        """Loads checkpoint and data set, and returns the engine's name. Raises `MacerError`."""
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: see `macer_serve.cli`
        job = self._job
        self._images = load_dataset(job.dataset, job.data_dir, "test", share=job.split)
        self._classifier = SmoothedClassifier.load(
            job.checkpoint,
            noise=job.noise,
            issuer=issuer_of(job.seed, job.key),
            options=job.options,
            hierarchy=job.coarse,
        )
        assert self._classifier.voter is not None
        return self._classifier.voter.engine

    def certify(self, idx: int) -> Row:
        """Returns the row of an image. Raises `MacerError`."""
        return certified_row(self._classifier, self._images, idx, self._job.plan)


class WorkerPool:
    """Workers on the Ray cluster that this process has joined. `engine` is the name of their engine, all the same.

    With a GPU in the cluster, or if the job asks for one, each worker has a GPU. Otherwise each has an equal number of
    cores. Raises `ParameterError` if there are fewer than workers, and what opening a worker raises.
    """

    def __init__(self, job: Job, workers: int) -> None:
        share = share_of(workers, device=job.options.device, cores=job.options.workers)
        options = replace(job.options, device=job.options.device or "cuda") if share.gpu else job.options
        options = replace(options, workers=job.options.workers or share.cores)
        self._job = replace(
            job,
            checkpoint=absolute(job.checkpoint),
            data_dir=job.data_dir.absolute(),
            key=None if job.key is None else job.key.absolute(),
            options=options,
        )
        self._resources: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1} if share.gpu else {"num_cpus": share.cores}
        self._workers = workers
        self._opening: dict[Any, Any] = {}  # actors by the pending result of their call
        self._running: dict[Any, tuple[Any, int]] = {}  # actors and the places of their images
        self._idle: deque[Any] = deque()
        self._failures = 0
        self.engine = ""
        for _ in range(workers):
            self._start()
        try:
            while not self.engine:
                self._next()
        except BaseException:
            self.close()
            raise

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yields the rows of these images in this order. The pool serves one iteration at a time.

        Raises the `MacerError` that an image raised, after the rows before it, and `ClusterError` if workers are lost
        again and again.
        """
        left, losses = list(range(len(indices))), Counter[int]()
        finished: dict[int, Row | MacerError] = {}
        done = 0
        while done < len(indices):
            while self._idle and left and left[0] < done + AHEAD * self._workers:
                at, actor = heapq.heappop(left), self._idle.popleft()
                self._running[actor.certify.remote(indices[at])] = actor, at
            place, result = self._next()
            if place is None:
                continue
            if result is not None:
                finished[place], self._failures = result, 0
            else:
                heapq.heappush(left, place)
                losses[place] += 1
                if losses[place] == MOST_LOSSES:
                    raise ClusterError(
                        f"{MOST_LOSSES} workers were lost while they certified image {indices[place]}: their machines "
                        "may lack memory; try a smaller batch",
                        settings=("batch",),
                    )
            while (row := finished.pop(done, None)) is not None:
                if isinstance(row, MacerError):
                    raise row
                yield row
                done += 1

    def close(self) -> None:
        """Ends the workers."""
        import ray

        actors = [*self._opening.values(), *(actor for actor, _ in self._running.values()), *self._idle]
        for actor in actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _start(self) -> None:
        import ray

        actors: Any = ray.remote(max_restarts=0, **self._resources)(Worker)
        actor = actors.remote(self._job)
        self._opening[actor.open.remote()] = actor

    def _next(self) -> tuple[int | None, Row | MacerError | None]:
        """Waits for a worker to be ready, to finish or to be lost, and returns the place of its image, if it had one.

        The place stands beside the image's row, or the error that it raised, or None if the worker was lost with it.
        """
        import ray

        while not (done := ray.wait([*self._opening, *self._running], timeout=PATIENCE_S)[0]):
            if not self._running:
                log.warning("waiting for workers: none is ready yet")
        (pending,) = done
        if pending in self._opening:
            self._opened(pending, self._opening.pop(pending))
            return None, None
        actor, place = self._running.pop(pending)
        try:
            row = ray.get(pending)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, MacerError):
                raise error.cause from error
            self._idle.append(actor)
            return place, error.cause
        except ray.exceptions.RayError as error:
            self._lost(actor, error)
            return place, None
        self._idle.append(actor)
        return place, row

    def _opened(self, pending: Any, actor: Any) -> None:
        """Takes a worker into the pool, or starts another if it is lost. Raises what opening it raised."""
        import ray

        try:
            engine = ray.get(pending)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            self._lost(actor, error)
            return
        self._idle.append(actor)
        self.engine = self.engine or engine
        if engine != self.engine:
            raise EngineMismatchError(
                f"the workers' engines differ, {self.engine} and {engine}: name one, or take machines of one kind",
                settings=("engine", "precision", "batch"),
            )

    def _lost(self, actor: Any, error: BaseException) -> None:
        """Starts a new worker. Raises `ClusterError` if that happened too often since an image was finished."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(actor)  # it may be cut off only
        self._failures += 1
        if self._failures == MOST_LOSSES * self._workers:
            raise ClusterError(
                f"workers were lost {self._failures} times and no image was finished ({first_line(error)}). Run the "
                "same command again to continue the log",
                settings=("workers",),
            )
        log.warning("a worker was lost (%s): its image is certified again", first_line(error))
        self._start()
