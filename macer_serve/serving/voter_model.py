"""A model as voters know it: which checkpoint, which noise, which engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from macer_serve.serving.settings import ModelSettings
from macer_serve.smoothing.noise import NoiseKind
from macer_serve.voters import VoterOptions


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
        self.count = _Method(handle.count, model)
        self.drive = _Method(handle.drive, model)


@dataclass(frozen=True, slots=True)
class _Method:
    method: Any
    model: VoterModel

    def remote(self, *arguments: Any) -> Any:
        """Returns the deployment's response, without waiting for it."""
        return self.method.remote(self.model, *arguments)
