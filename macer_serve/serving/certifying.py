"""One certification of a request: its job among the others, its deadline, and a client who may leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from macer_serve.issuing import SeedProof
from macer_serve.serving.cutoffs import Cutoffs
from macer_serve.serving.jobs import Job
from macer_serve.serving.problems import ClientLeftError
from macer_serve.serving.remote_voter import RemoteVoter
from macer_serve.serving.settings import ModelSettings
from macer_serve.smoothed import ModelInput, SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Served:
    """One model: its classifier without network, its voters, its settings."""

    classifier: SmoothedClassifier
    voter: RemoteVoter
    settings: ModelSettings


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of the work. If the client disconnects, cancels the work and raises `ClientLeftError`.

    Ray cancels work, too, but a client can forbid that by a header.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError("the client has left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def certify_job(
    served: Served,
    job: Job,
    model_input: ModelInput,
    proof: SeedProof,
    plan: Plan,
    cap: int,
    cutoffs: Cutoffs,
    progress: Callable[[Certificate], None] | None = None,
) -> Certificate:
    """Returns the certificate, or what is proved at the deadline of the job; `progress` sees it grow."""
    run = served.classifier.certification(model_input, plan, cap=cap)
    voter = await served.voter.describe()

    def report(run: Certification) -> None:
        if progress is not None and not run.done:
            progress(served.classifier.certificate(model_input, run, proof, voter.engine))

    try:
        async with cutoffs.applied():
            watch = None if progress is None else report
            run = await served.voter.drive(job, run, model_input.x, proof.seed, voter, watch)
    except TimeoutError:
        run = job.run or run
        run.stop("deadline")
    return served.classifier.certificate(model_input, run, proof, voter.engine)


def ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)
