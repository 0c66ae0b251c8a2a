"""The typed arguments of `macer_serve.serving.app:build`, as a deployment's YAML gives them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from macer_serve.errors import ParameterError
from macer_serve.images import DEFAULT_LIMITS, MAX_PIXELS
from macer_serve.smoothing.bounds import BOUNDS, bound_named
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions

# A model's name is part of its voter deployment's name, of metrics and of URLs.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

HostName = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)$")]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]


def _known_bound(name: str) -> str:
    """Returns the name of a bound. Raises `ParameterError` if there is none of that name."""
    bound_named(name)
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(_Strict):
    """One served checkpoint: where it lies, the plan it is certified by, and its voters."""

    checkpoint: str = Field(description="A checkpoint folder, or bundled:NAME.")
    digest: Annotated[
        str | None, Field(pattern=r"^sha256:[0-9a-f]{64}$", description="The checkpoint's digest. Default: any.")
    ] = None
    n0: Annotated[int, Field(ge=1, le=10**6, description="Selection votes.")] = 100
    n: Annotated[int, Field(ge=1, le=10**7, description="Estimation votes at most: the plan's last look.")] = 10_000
    cap: Annotated[int | None, Field(ge=1, description="Votes unless a request names n. Default: n.")] = None
    alpha: Annotated[float, Field(gt=0, lt=0.5, description="1 - confidence.")] = 0.001
    radius: Annotated[float | None, Field(gt=0, description="Plan: decide whether the radius is so large.")] = None
    tolerance: Annotated[float | None, Field(gt=0, description="Plan: the radius to within so much.")] = None
    bound: Annotated[str, AfterValidator(_known_bound), Field(description=f"One of: {', '.join(BOUNDS)}.")] = (
        "one-sided"
    )
    beta: Annotated[float, Field(gt=0, lt=1000, description="soft: inverse temperature.")] = 16.0
    coarse: Annotated[bool, Field(description="Coarse answers, unless a request says otherwise.")] = True
    n_predict: Annotated[int, Field(ge=1, le=10**7, description="Votes of mode=predict.")] = 1000
    noise: Literal["exact", "gaussian"] = "exact"
    reveal: Annotated[
        Literal["radius", "bucket", "decision"],
        Field(
            description="What clients see: the radius, its bucket on the grid, or whether a radius of it is reached."
        ),
    ] = "radius"
    bucket_grid: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...], Field(description="Radii that may be revealed, in rising order.")
    ] = ()
    replicas: Annotated[int, Field(ge=1)] = 1
    num_cpus: Annotated[float, Field(ge=0, description="CPUs that Ray reserves for a replica.")] = 1
    num_gpus: Annotated[float, Field(ge=0, description="GPUs that Ray reserves for a replica.")] = 0
    voter: VoterOptions = Field(VoterOptions(), description="Engine, device, precision, batch, workers, compile.")

    @model_validator(mode="after")
    def _is_a_plan(self) -> ModelSettings:
        self.plan()
        if self.cap is not None and self.cap > self.n:
            raise ValueError(f"cap must not exceed n = {self.n}, not {self.cap}")
        if (self.reveal == "radius") != (not self.bucket_grid):
            raise ValueError(f"bucket_grid belongs to reveal: bucket or decision, not to reveal: {self.reveal}")
        if list(self.bucket_grid) != sorted(set(self.bucket_grid)):
            raise ValueError("bucket_grid must be radii in rising order, such as [0.25, 0.5]")
        return self

    def plan(self) -> Plan:
        """The plan of requests that ask for nothing else."""
        return Plan(
            n0=self.n0,
            n=self.n,
            alpha=self.alpha,
            radius=self.radius,
            tolerance=self.tolerance,
            bound=self.bound,
            beta=self.beta,
            coarse=self.coarse,
        )

    def asked(
        self,
        *,
        mode: Literal["certify", "predict"] = "certify",
        n: int | None = None,
        alpha: float | None = None,
        radius: float | None = None,
        tolerance: float | None = None,
        coarse: bool | None = None,
    ) -> tuple[Plan, int]:
        """The plan of a request and the cap on its votes; raises `ParameterError` for what is not offered."""
        plan = replace(self.plan(), alpha=alpha or self.alpha, coarse=self.coarse if coarse is None else coarse)
        if coarse and (mode == "predict" or self.bound == "soft"):
            raise ParameterError("mode=predict and the soft bound give no coarse answers: leave coarse out")
        if mode == "predict":
            if self.bound == "soft":
                raise ParameterError("this model certifies the soft smoothed classifier; predict is for hard votes")
            plan = Plan(n=self.n_predict, alpha=plan.alpha, radius=radius, tolerance=tolerance, mode="predict")
        elif radius is not None or tolerance is not None:
            if plan.kind == "fixed":  # it spends all of alpha at n, and so a client would get a second chance
                raise ParameterError("this model's plan is fixed: it offers neither radius nor tolerance")
            plan = replace(plan, radius=radius, tolerance=tolerance)
        if n is not None and n > plan.n:
            raise ParameterError(f"n must not exceed this model's {plan.n}, not {n}")
        return plan, n or min(self.cap or plan.n, plan.n)


class LimitSettings(_Strict):
    """What one request, and all of them together, may ask for."""

    bytes: Annotated[int, Field(ge=1, description="Upload size.")] = DEFAULT_LIMITS.bytes
    pixels: Annotated[int, Field(ge=1, le=MAX_PIXELS, description="Upload width x height.")] = DEFAULT_LIMITS.pixels
    alpha: Annotated[float, Field(gt=0, lt=0.5, description="Largest alpha a client may choose.")] = 0.05
    timeout_s: Annotated[
        float, Field(gt=0, description="Seconds from upload to answer, unless a request names fewer.")
    ] = 60.0
    upload_s: Annotated[float, Field(gt=0, description="Seconds to upload.")] = 60.0
    upload_rate: Annotated[float, Field(gt=0, description="Bytes per second at which an upload must come.")] = 1024.0
    uploads: Annotated[int, Field(ge=1, description="Uploads in progress; the slowest makes room for the next.")] = 128
    uploads_per_client: Annotated[int, Field(ge=1, description="Uploads in progress of one client's address.")] = 32
    concurrent: Annotated[
        int, Field(ge=1, description="Requests in work at most, however short. A bound of memory: time decides first.")
    ] = 512
    grace_s: Annotated[
        float, Field(gt=0, le=3600, description="Seconds that requests in work have at the end of the server.")
    ] = 75.0


class AppSettings(_Strict):
    """The whole application. The first model is the default of requests that name none."""

    models: dict[ModelName, ModelSettings]
    limits: LimitSettings = LimitSettings()
    key_file: str | None = Field(
        None,
        description="Private key file of seeds and signatures (macer key new). Default: a new key per start.",
    )
    key_id: str | None = Field(None, description="The id of the key in key_file. Default: any.")
    ingress_replicas: Annotated[int, Field(ge=1, description="Processes that answer HTTP requests.")] = 1
    withheld_dir: str | None = Field(
        None,
        description="Where the certificates of models with reveal: bucket or decision are kept, one file each.",
    )

    cors_origins: tuple[Origin, ...] = Field(
        (), description="Origins whose pages may use the server, as https://example.org; * for all. Default: none."
    )

    trusted_hosts: tuple[HostName, ...] = Field(
        (),
        description="Host names of the server, as example.org, *.example.org or * for all. Addresses and localhost are "
        "accepted anyway. Default: none if the server listens on the loopback address, otherwise all.",
    )

    @model_validator(mode="after")
    def _has_models(self) -> AppSettings:
        if not self.models:
            raise ValueError("models must name at least one checkpoint")
        withheld = [name for name, model in self.models.items() if model.reveal != "radius"]
        if withheld and self.withheld_dir is None:
            raise ValueError(
                f"withheld_dir must name a folder: model {withheld[0]} does not reveal its certificates, and without "
                "them nobody could ever show the evidence"
            )
        return self

    @model_validator(mode="after")
    def _names_a_key(self) -> AppSettings:
        if self.key_id is not None and self.key_file is None:
            raise ValueError("key_id needs key_file")
        return self
