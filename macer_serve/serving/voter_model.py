"""A model as voters know it: which checkpoint, which noise, which engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from macer_serve.serving.settings import ModelSettings
from macer_serve.smoothing.noise import NoiseKind
from macer_serve.voters import VoterOptions

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class VoterModel:
    """What a voter's votes depend on. `digest` names the checkpoint; `checkpoint` says where it was when deployed."""

    digest: str
    noise: NoiseKind
    options: VoterOptions
    checkpoint: str = field(compare=False)

    @classmethod
    def of(cls, settings: ModelSettings, digest: str) -> VoterModel:
        return cls(digest, settings.noise, settings.voter, settings.checkpoint)


class ModelHandle:
    """A handle of a voter deployment whose calls name the model.

    While a deployment is replaced, requests of its predecessor go to the new voters, too, and are about the old model.
    """

    def __init__(self, handle: Any, model: VoterModel) -> None:
        self.describe = _Method(handle.describe, model)
        self.count = _Method(handle.count.options(stream=True), model, of_one=True)
        self.drive = _Method(handle.drive.options(stream=True), model, of_one=True)


@dataclass(frozen=True, slots=True)
class _Method:
    method: Any
    model: VoterModel
    of_one: bool = False  # whether it is a generator of one value

    def remote(self, *arguments: Any) -> Any:
        """Returns the deployment's response, without waiting for it."""
        response = self.method.remote(self.model, *arguments)
        return _OnlyValue(response) if self.of_one else response


@dataclass(frozen=True, slots=True)
class _OnlyValue:
    """The value of a generator that yields one. Can be awaited once."""

    generator: Any
    _ending: ClassVar[set[asyncio.Task[None]]] = set()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._value().__await__()

    async def _value(self) -> Any:
        value = await anext(self.generator)
        # Only its end frees a generator. Nobody waits for that, which takes as long as a message.
        end = asyncio.create_task(self._end())
        self._ending.add(end)
        end.add_done_callback(self._ending.discard)
        return value

    async def _end(self) -> None:
        try:
            async for _ in self.generator:
                pass
        except Exception:  # such as a replica that is lost now
            log.debug("a replica's answer has come, but not its end", exc_info=True)

    def cancel(self) -> None:
        """Ends the generator, too, where it runs."""
        self.generator.cancel()
