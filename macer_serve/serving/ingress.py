"""The HTTP side: decode, validate, drive the certification, answer."""

# Ray serialises the routes at decoration: annotations must be types, not postponed strings, and whatever a
# handler calls must be defined above it or imported.
import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse
from ray import serve

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.errors import ParameterError
from macer_serve.images import UploadLimits
from macer_serve.issuing import Issuer, SeedProof
from macer_serve.serving import problems
from macer_serve.serving.certifying import Served, cancel_on_disconnect, certify_job, ms
from macer_serve.serving.cutoffs import Cutoffs
from macer_serve.serving.documentation import ASSETS, BODY, DOCS, PAGE, PROBLEMS, RESPONSES, asset
from macer_serve.serving.hosts import Hosts, trusted
from macer_serve.serving.middleware import Cors, DrainRequestBody
from macer_serve.serving.ports import bound_host, keep_to_loopback, metrics_addresses
from macer_serve.serving.problems import (
    UnavailableError,
    UnknownModelError,
)
from macer_serve.serving.query import PredictQuery
from macer_serve.serving.remote_voter import RemoteVoter
from macer_serve.serving.rollout import until_voters_are_new
from macer_serve.serving.schemas import (
    Answer,
    ModelDescription,
    Progress,
    ShortAnswer,
    Timing,
    answer,
    progress,
    short_answer,
)
from macer_serve.serving.settings import AppSettings
from macer_serve.serving.slots import RequestSlots
from macer_serve.serving.streaming import EventStream, events
from macer_serve.serving.upload_limits import Uploads
from macer_serve.serving.uploads import read_image
from macer_serve.serving.voter_model import ModelHandle, VoterModel
from macer_serve.serving.whole_uploads import ReceiveBodyFromScope
from macer_serve.serving.withholding import asked_radius, plan_radius, withhold
from macer_serve.smoothed import ModelInput, SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.plan import Plan
from macer_serve.version import __version__

log = logging.getLogger("ray.serve")

_PROBE_S = 0.9  # for a voter to say that it is ready
_SIGNING_S = 0.1  # of a request's time are kept for signing and sending the answer
_DECODERS = 4  # uploads decoded at a time: each may take some 100 MB

app = FastAPI(
    title="macer-serve",
    version=__version__,
    description="Certified inference: every answer carries an L2 radius inside which nothing changes the class.",
    docs_url=None,  # ours needs no other server
    redoc_url=None,
)
problems.install(app)
app.add_middleware(Hosts)
app.add_middleware(Cors)
app.add_middleware(DrainRequestBody)  # outside of the others: whoever answers, the body is read
app.add_middleware(ReceiveBodyFromScope)  # the last is the outermost


@serve.ingress(app)
class Ingress:
    """Keeps the state of each request in its coroutine; no statistics and no network live here."""

    def __init__(
        self, settings: AppSettings, configs: dict[str, CheckpointConfig], key: str, voters: dict[str, Any]
    ) -> None:
        keep_to_loopback()
        Cors.allow(settings.cors_origins)
        Hosts.allow(trusted(settings.trusted_hosts, bound_host()), settings.cors_origins)
        self._limits, self._only_ingress = settings.limits, settings.ingress_replicas == 1
        self._uploads = Uploads(
            timeout_s=settings.limits.upload_s,
            rate=settings.limits.upload_rate,
            per_client=settings.limits.uploads_per_client,
            in_all=settings.limits.uploads,
        )
        limits = UploadLimits(settings.limits.bytes, settings.limits.pixels)
        issuer = Issuer.read(key)  # an issuer cannot be pickled
        self._keys: dict[str, Any] = json.loads(issuer.keys.to_json())
        self._issuer, self._withheld_dir = issuer, settings.withheld_dir
        self._models = {}
        for name, m in settings.models.items():
            classifier = SmoothedClassifier(configs[name], noise=m.noise, issuer=issuer, limits=limits)
            model = VoterModel.of(m, classifier.config.digest)
            voter = RemoteVoter(ModelHandle(voters[name], model), m.replicas, model.digest)
            self._models[name] = Served(classifier, voter, m)
        self._default = next(iter(settings.models))
        # Its own threads, not `to_thread`: a client that leaves does not stop its decoder, nor free the place.
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoder")
        self._signer = ThreadPoolExecutor(1, "signer")  # so that no answer waits for the decoding of uploads
        self._slots = RequestSlots(settings.limits.concurrent)
        self._cutoffs = Cutoffs()
        self._takes_over: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Returns the first time when this replica may take over. Serve sends it no request before."""
        if self._takes_over is None:
            self._takes_over = asyncio.create_task(until_voters_are_new(self._models))
        await self._takes_over

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests from now on; returns when those in work are answered.

        Certifications that run after `grace_s` seconds end with what they have proved, as at a deadline.
        """
        if not self._slots.draining:
            self._slots.draining = True
            self._cutoffs.set(grace_s)
            for served in self._models.values():
                served.voter.end_by(time.monotonic() + grace_s)
        await self._slots.until_all_are_free()

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page(self) -> HTMLResponse:
        html, headers = PAGE
        return HTMLResponse(html, headers=headers)

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs(self) -> HTMLResponse:
        html, headers = DOCS
        return HTMLResponse(html, headers=headers)

    @app.get("/docs/{name}", include_in_schema=False)
    async def docs_asset(self, name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404, "there is no such page; see /docs")
        return Response(asset(name), media_type=ASSETS[name], headers={"Cache-Control": "max-age=86400"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics(self) -> Response:
        ports = await asyncio.to_thread(metrics_addresses)
        raise HTTPException(404, f"metrics in Prometheus' format are served by each Ray node: {', '.join(ports)}")

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="No restart is needed", responses={503: PROBLEMS[503]})
    async def healthz(self) -> dict[str, str]:
        if replaced := [name for name, served in self._models.items() if served.voter.replaced]:
            raise UnavailableError(f"the checkpoint of {', '.join(replaced)} was replaced; restart the server")
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Every model can certify", responses={503: PROBLEMS[503]})
    async def readyz(self) -> dict[str, Any]:
        self._slots.refuse_if_draining()
        described = await asyncio.gather(*(m.voter.ask(_PROBE_S) for m in self._models.values()))
        return {
            "status": "ready",
            "models": {
                # Counts before and after a request would show how many votes an answer took.
                name: {"engine": voter.engine}
                if (served := self._models[name]).settings.reveal != "radius"
                else {"engine": voter.engine, "calls": served.voter.calls, "votes": served.voter.votes}
                for name, voter in zip(self._models, described, strict=True)
            },
        }

    @app.head("/.well-known/jwks.json", include_in_schema=False)
    @app.get("/.well-known/jwks.json", summary="The public keys that check seeds and signatures")
    async def keys(self) -> dict[str, Any]:
        return self._keys

    @app.head("/models", include_in_schema=False)
    @app.get("/models", summary="The models served")
    async def models(self) -> list[ModelDescription]:
        return [self._describe(name) for name in self._models]

    @app.get("/v1/predict/", include_in_schema=False)
    @app.get("/v1/predict", include_in_schema=False)
    @app.get("/predict/", include_in_schema=False)
    @app.get("/predict", include_in_schema=False)
    async def how_to_predict(self) -> Response:
        detail = "send an image by POST, for example curl -F file=@image.png, or open / in a browser; /docs says more"
        raise HTTPException(405, detail, headers={"Allow": "POST"})

    @app.post("/v1/predict/", include_in_schema=False)
    @app.post("/v1/predict", responses=RESPONSES, openapi_extra=BODY, summary="Certify an image")
    @app.post("/predict/", include_in_schema=False)
    @app.post("/predict", responses=RESPONSES, openapi_extra=BODY, summary="Certify an image")
    async def predict(
        self, request: Request, response: Response, query: Annotated[PredictQuery, Query()]
    ) -> Answer | ShortAnswer:
        """The class of the image and the radius inside which nothing changes it, or an abstention (also 200)."""
        request.state.only_ingress = self._only_ingress  # what it refuses, no other replica would admit
        named = Counter(name for name, _ in request.query_params.multi_items())
        if repeated := [name for name, times in named.items() if times > 1]:
            raise ParameterError(f"{', '.join(repeated)} is given more than once")
        served = self._served(query.model)
        alpha, timeout_s = query.alpha, query.timeout_s
        if alpha is not None and alpha > self._limits.alpha:
            raise ParameterError(f"alpha must not exceed this server's {self._limits.alpha:g}, not {alpha:g}")
        hidden, asked = served.settings.reveal != "radius", asked_radius(served.settings, query)
        radius = plan_radius(served.settings, query, asked)
        plan, cap = served.settings.asked(
            mode=query.mode,
            n=query.n,
            alpha=alpha,
            radius=radius,
            tolerance=query.tolerance,
            coarse=query.coarse,
        )
        limit = self._limits.timeout_s
        if timeout_s is not None and timeout_s > limit:
            raise ParameterError(f"timeout_s must not exceed this server's {limit:g}, not {timeout_s:g}")
        budget = limit if timeout_s is None else timeout_s
        self._slots.refuse_if_draining()
        for_votes = max(budget - _SIGNING_S, 0.5 * budget)
        await served.voter.describe(budget)
        served.voter.require_time(plan, cap, for_votes)  # a refusal should not come after the whole upload
        data = await self._uploads.read(request, lambda body: read_image(body, self._limits.bytes))
        async with AsyncExitStack() as place:
            await place.enter_async_context(self._slots.slot())
            uploaded = time.perf_counter()
            job = place.enter_context(served.voter.admitted(plan, cap, for_votes))
            decoding = self._decode(served, data, plan)
            model_input, proof, began, decoded = await cancel_on_disconnect(request, decoding)

            async def certify(report: Callable[[Progress], None] | None = None) -> Answer | ShortAnswer:
                growing = None if report is None or hidden else lambda certificate: report(progress(certificate))
                work = certify_job(served, job, model_input, proof, plan, cap, self._cutoffs, growing)
                certificate = await cancel_on_disconnect(request, work)
                jws = await asyncio.get_running_loop().run_in_executor(
                    self._signer, served.classifier.signed, certificate
                )
                if hidden:
                    return await self._short_answer(served, certificate, str(jws), asked)
                finished = time.perf_counter()
                timing = Timing(queue=ms(began - uploaded), decode=ms(decoded - began), certify=ms(finished - decoded))
                return answer(certificate, jws, served.classifier.config.classes, timing)

            if query.stream:  # the place goes with it
                return EventStream(events(certify, request.url.path), place.pop_all().aclose)  # type: ignore[return-value]
            response.headers["Cache-Control"] = "no-store"
            return await certify()

    async def _short_answer(
        self, served: Served, certificate: Certificate, jws: str, asked: float | None
    ) -> ShortAnswer:
        """Returns what the model reveals of a certificate, which is kept first."""
        assert self._withheld_dir is not None  # AppSettings has checked it
        claim, signed = await asyncio.get_running_loop().run_in_executor(
            self._signer, withhold, certificate, jws, served.settings, asked, self._withheld_dir, self._issuer
        )
        return short_answer(claim, signed)

    async def _decode(self, served: Served, data: bytes, plan: Plan) -> tuple[ModelInput, SeedProof, float, float]:
        """Returns an upload as model input, its seed under the plan's policy, and when decoding began and ended."""

        def timed() -> tuple[ModelInput, SeedProof, float, float]:
            began = time.perf_counter()
            model_input = served.classifier.model_input(data)
            return model_input, served.classifier.seed_proof(model_input, plan), began, time.perf_counter()

        return await asyncio.get_running_loop().run_in_executor(self._decoders, timed)

    def _served(self, name: str | None) -> Served:
        try:
            return self._models[self._default if name is None else name]
        except KeyError:
            raise UnknownModelError(f"there is no model {name!r}; choose one of: {', '.join(self._models)}") from None

    def _describe(self, name: str) -> ModelDescription:
        served = self._models[name]
        config = served.classifier.config
        return ModelDescription(
            name=name,
            digest=config.digest,
            architecture=config.architecture,
            classes=list(config.classes),
            sigma=config.sigma,
            input_shape=list(config.input_shape),
            noise=served.classifier.noise.name,
            plan=served.classifier.policy_plan(served.settings.plan()).to_json(),
            cap=served.settings.asked()[1],
            default=name == self._default,
            reveal=served.settings.reveal,
            bucket_grid=list(served.settings.bucket_grid),
        )
