"""The HTTP side: decode, validate, drive the certification, answer."""

# Ray serialises the routes at decoration: annotations must be types, not postponed strings, and whatever a
# handler calls must be defined above it or imported.
import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse
from ray import serve

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.errors import ParameterError
from macer_serve.images import UploadLimits
from macer_serve.issuing import Issuer, SeedProof
from macer_serve.serving import problems
from macer_serve.serving.documentation import ASSETS, BODY, DOCS, PAGE, PROBLEMS, RESPONSES, asset
from macer_serve.serving.middleware import Cors, DrainRequestBody
from macer_serve.serving.ports import keep_to_loopback, metrics_addresses
from macer_serve.serving.problems import (
    ClientLeftError,
    DrainingError,
    OverloadedError,
    SlowUploadError,
    UnknownModelError,
)
from macer_serve.serving.query import PredictQuery
from macer_serve.serving.remote_voter import RemoteVoter
from macer_serve.serving.schemas import Answer, ModelDescription, Progress, Timing, answer, progress
from macer_serve.serving.settings import AppSettings, ModelSettings
from macer_serve.serving.streaming import EventStream, events
from macer_serve.serving.uploads import read_image
from macer_serve.smoothed import ModelInput, SmoothedClassifier
from macer_serve.smoothing.certificate import Certificate
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.plan import Plan
from macer_serve.version import __version__

log = logging.getLogger("ray.serve")

_PROBE_S = 2.0  # for a voter to say that it is ready
_DECODERS = 4  # uploads decoded at a time: each may take some 100 MB

T = TypeVar("T")

app = FastAPI(
    title="macer-serve",
    version=__version__,
    description="Certified inference: every answer carries an L2 radius inside which nothing changes the class.",
    docs_url=None,  # ours needs no other server
    redoc_url=None,
)
problems.install(app)
app.add_middleware(DrainRequestBody)
app.add_middleware(Cors)


@dataclass(frozen=True, slots=True)
class Served:
    """One model: its classifier without network, its voters, its settings."""

    classifier: SmoothedClassifier
    voter: RemoteVoter
    settings: ModelSettings


async def _cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
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


async def _certify(
    served: Served,
    model_input: ModelInput,
    proof: SeedProof,
    plan: Plan,
    cap: int,
    budget_s: float,
    progress: Callable[[Certificate], None] | None = None,
) -> Certificate:
    """Returns the certificate, or what is proved when the time for votes is over; `progress` sees it grow."""
    run = served.classifier.certification(model_input, plan, cap=cap)
    voter = await served.voter.describe()

    def report(run: Certification) -> None:
        if progress is not None and not run.done:
            progress(served.classifier.certificate(model_input, run, proof, voter.engine))

    try:
        async with asyncio.timeout(budget_s):
            await served.voter.drive(run, model_input.x, proof.seed, voter, report)
    except TimeoutError:
        run.stop("deadline")
    return served.classifier.certificate(model_input, run, proof, voter.engine)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


@serve.ingress(app)
class Ingress:
    """Keeps the state of each request in its coroutine; no statistics and no network live here."""

    def __init__(
        self, settings: AppSettings, configs: dict[str, CheckpointConfig], key: str, voters: dict[str, Any]
    ) -> None:
        keep_to_loopback()
        Cors.allow(settings.cors_origins)
        self._limits = settings.limits
        limits = UploadLimits(settings.limits.bytes, settings.limits.pixels)
        issuer = Issuer.read(key)  # an issuer cannot be pickled
        self._keys: dict[str, Any] = json.loads(issuer.keys.to_json())
        self._models = {}
        for name, m in settings.models.items():
            classifier = SmoothedClassifier(configs[name], noise=m.noise, issuer=issuer, limits=limits)
            voter = RemoteVoter(voters[name], m.replicas, classifier.config.digest)
            self._models[name] = Served(classifier, voter, m)
        self._default = next(iter(settings.models))
        # Its own threads, not `to_thread`: a client that leaves does not stop its decoder, nor free the place.
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoder")
        self._signer = ThreadPoolExecutor(1, "signer")  # so that no answer waits for the decoding of uploads
        self._in_work = 0
        self._draining, self._idle = False, asyncio.Event()
        self._idle.set()

    async def drain(self) -> None:
        """Refuses new requests from now on; returns when those in flight are answered."""
        self._draining = True
        await self._idle.wait()

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
    @app.get("/healthz", summary="The ingress is alive")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Every model can certify", responses={503: PROBLEMS[503]})
    async def readyz(self) -> dict[str, Any]:
        if self._draining:
            raise DrainingError("the server is shutting down")
        described = await asyncio.gather(*(m.voter.describe(_PROBE_S) for m in self._models.values()))
        return {
            "status": "ready",
            "models": {
                name: {"engine": voter.engine, "passes": voter.passes}
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
    async def predict(self, request: Request, response: Response, query: Annotated[PredictQuery, Query()]) -> Answer:
        """The class of the image and the radius inside which nothing changes it, or an abstention (also 200)."""
        named = Counter(name for name, _ in request.query_params.multi_items())
        if repeated := [name for name, times in named.items() if times > 1]:
            raise ParameterError(f"{', '.join(repeated)} is given more than once")
        served = self._served(query.model)
        alpha, timeout_s = query.alpha, query.timeout_s
        if alpha is not None and alpha > self._limits.alpha:
            raise ParameterError(f"alpha must not exceed this server's {self._limits.alpha:g}, not {alpha:g}")
        plan, cap = served.settings.asked(
            mode=query.mode, n=query.n, alpha=alpha, radius=query.radius, tolerance=query.tolerance
        )
        limit = self._limits.timeout_s
        if timeout_s is not None and timeout_s > limit:
            raise ParameterError(f"timeout_s must not exceed this server's {limit:g}, not {timeout_s:g}")
        budget = limit if timeout_s is None else timeout_s
        async with AsyncExitStack() as place:
            await place.enter_async_context(self._slot())
            try:
                async with asyncio.timeout(limit):
                    data = await read_image(request, self._limits.bytes)
            except TimeoutError:
                raise SlowUploadError(f"the upload was not complete after {limit:g} s") from None
            uploaded = time.perf_counter()
            decoding = self._decode(served, data, plan)
            model_input, proof, began, decoded = await _cancel_on_disconnect(request, decoding)

            async def certify(report: Callable[[Progress], None] | None = None) -> Answer:
                growing = None if report is None else lambda certificate: report(progress(certificate))
                work = _certify(served, model_input, proof, plan, cap, budget, growing)
                certificate = await _cancel_on_disconnect(request, work)
                jws = await asyncio.get_running_loop().run_in_executor(
                    self._signer, served.classifier.signed, certificate
                )
                finished = time.perf_counter()
                timing = Timing(
                    queue=_ms(began - uploaded), decode=_ms(decoded - began), certify=_ms(finished - decoded)
                )
                return answer(certificate, jws, served.classifier.config.classes, timing)

            if query.stream:  # the place goes with it
                return EventStream(events(certify, request.url.path), place.pop_all().aclose)  # type: ignore[return-value]
            response.headers["Cache-Control"] = "no-store"
            return await certify()

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

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """Holds one request slot until the context ends.

        Raises `OverloadedError` if all slots are taken, `DrainingError` if the server is about to end.
        """
        if self._draining:
            raise DrainingError("the server is shutting down; try again shortly")
        if self._in_work >= self._limits.concurrent:
            raise OverloadedError(f"{self._in_work} requests are in work already; try again shortly")
        self._in_work += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_work -= 1
            if not self._in_work:
                self._idle.set()

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
            plan=served.settings.plan().to_json(),
            cap=served.settings.asked()[1],
            default=name == self._default,
        )
