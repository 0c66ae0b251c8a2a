"""Calls to any replica of a deployment whose results are the same by whichever: they outlive lost and hung replicas."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

from grpc import StatusCode
from grpc.aio import AioRpcError
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from macer_serve.errors import EngineMismatchError
from macer_serve.serving.problems import UnavailableError

log = logging.getLogger("ray.serve")

_CALLS = 3  # in flight for the same result, at most
_OVERTAKEN = 8  # times that a call is given more time because others go before it
_PAUSE_S = 1.0  # between repetitions of a failed call, at most
_LOST = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)  # what gRPC says of a replica that has ended
_OTHER_ENGINES = 6  # refusals by replicas of another engine after which a call is given up


class RepeatedCalls:
    """Calls that are repeated when their replica is lost, and sent to another one, too, when they are late.

    `other_engine` is what a caller is told if only replicas of another engine answer. `lost_at` is the time of
    `time.monotonic` at which a replica was lost; None after the owner has set it so, when replicas count again.
    """

    def __init__(self, other_engine: str) -> None:
        self.lost_at: float | None = None
        self._other_engine = other_engine
        self._late: set[asyncio.Task[Any]] = set()  # calls that nobody waits for any more

    async def first(
        self,
        call: Callable[[], Any],
        patience_s: float,
        overtaken: Callable[[], bool] = lambda: False,
        lasts_s: float = 0.0,
    ) -> Any:
        """Returns the first result of a call, which may last `lasts_s` seconds by itself.

        When it is late by `patience_s`, it is sent to a further replica, and again after as many seconds. A call that
        is overtaken is not late so soon: the replica makes one pass in eight of the oldest call. The late call is left
        to its replica, so that Serve's router, which sends to the replica with fewer calls, sends it nothing more.
        Raises `UnavailableError` if the replicas are overloaded, or all of another engine, and what a replica itself
        raises.
        """
        calls = [asyncio.create_task(self._repeated(call))]
        late: list[asyncio.Task[Any]] = []
        waits, wait_s = _OVERTAKEN, lasts_s + patience_s
        try:
            while True:
                done, _ = await asyncio.wait(calls, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                wait_s = patience_s
                if done:
                    return done.pop().result()
                if waits and overtaken():
                    waits -= 1
                    continue
                late = list(calls)
                if len(calls) < _CALLS:
                    log.warning("a voter is late: another one is asked")
                    calls.append(asyncio.create_task(self._repeated(call)))
        finally:
            for left in calls:
                if left in late:
                    self._late.add(left)
                    left.add_done_callback(self._forget)
                else:
                    left.cancel()
            await asyncio.gather(*(left for left in calls if left not in late), return_exceptions=True)

    def _forget(self, late: asyncio.Task[Any]) -> None:
        self._late.discard(late)
        if not late.cancelled():
            late.exception()  # nobody waits for it

    async def _repeated(self, call: Callable[[], Any]) -> Any:
        """Returns the result of a call. If its replica is lost, the call is repeated and gives the same result."""
        others = 0
        for attempt in itertools.count():
            response = call()
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                why = "the replica was stopped"  # Ray reports that, too, as a cancellation
            except BackPressureError as error:
                raise UnavailableError("the voters are overloaded; try again shortly") from error
            except (RayError, AioRpcError, DeploymentUnavailableError, EngineMismatchError) as error:
                # What the replica itself raised arrives as it is, or as a RayTaskError that is also of its class.
                if isinstance(error, EngineMismatchError):
                    others += 1
                    if others == _OTHER_ENGINES:
                        raise UnavailableError(self._other_engine) from error
                elif isinstance(error, RayTaskError) or (isinstance(error, AioRpcError) and error.code() not in _LOST):
                    raise
                why = type(error).__name__
            if asyncio.current_task() in self._late:
                return None
            self.lost_at = self.lost_at or time.monotonic()
            log.warning("a voter is asked again: %s", why)
            await asyncio.sleep(min(_PAUSE_S, 0.05 * 2**attempt))
        raise AssertionError("unreachable")
