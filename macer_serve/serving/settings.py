"""The typed arguments of `macer_serve.serving.app:build`, as a deployment's YAML gives them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from macer_serve.images import MAX_PIXELS

# A model's name is part of its voter deployment's name, of metrics and of URLs.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(_Strict):
    """One served checkpoint: where it lies, the plan it is certified by, and its voters."""

    checkpoint: str = Field(description="A checkpoint folder, or bundled:NAME.")
    n0: Annotated[int, Field(ge=1, le=10**6, description="Selection votes.")] = 100
    n: Annotated[int, Field(ge=1, le=10**7, description="Estimation votes: the plan's one look.")] = 10_000
    alpha: Annotated[float, Field(gt=0, lt=0.5, description="1 - confidence.")] = 0.001
    noise: Literal["exact", "gaussian"] = "exact"
    replicas: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0, description="CPUs that Ray reserves for a replica.")] = 1
    num_gpus: Annotated[float, Field(ge=0, description="GPUs that Ray reserves for a replica.")] = 0
    device: str | None = Field(None, description="cpu or cuda; default: cuda where there is one.")
    workers: Annotated[int | None, Field(ge=1, description="CPU cores a replica computes on; default: all.")] = None
    batch: Annotated[int | None, Field(ge=1, description="Noisy copies a forward pass.")] = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = True


class LimitSettings(_Strict):
    """What one request, and all of them together, may ask for."""

    bytes: Annotated[int, Field(ge=1, description="Upload size.")] = 10 * 2**20
    pixels: Annotated[int, Field(ge=1, le=MAX_PIXELS, description="Upload width x height.")] = 25_000_000
    alpha: Annotated[float, Field(gt=0, lt=0.5, description="Largest alpha a client may choose.")] = 0.05
    timeout_s: Annotated[
        float, Field(gt=0, description="Seconds to vote, unless a request names fewer; and to upload.")
    ] = 60.0
    concurrent: Annotated[int, Field(ge=1, description="Requests in work; more are answered 429.")] = 64


class AppSettings(_Strict):
    """The whole application. The first model is the default of requests that name none."""

    models: dict[ModelName, ModelSettings]
    limits: LimitSettings = LimitSettings()
    secret_file: str | None = Field(
        None, description="File with the secret of seeds and macs (16 bytes or more). Default: a fresh one a start."
    )

    @model_validator(mode="after")
    def _has_models(self) -> AppSettings:
        if not self.models:
            raise ValueError("models must name at least one checkpoint")
        return self
