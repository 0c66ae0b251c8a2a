"""The app builder: `serve run deployments/smoothed.yaml` calls `build` with the YAML's args."""

# No postponed annotations here: Ray reads the class of `args` off the builder's signature.
import logging
import math
from dataclasses import replace
from itertools import combinations
from typing import cast

import ray
from ray import serve
from ray.serve import Application, Deployment

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.checkpoint.pinned import pin, remove_unused
from macer_serve.errors import IssuerKeyError, ParameterError
from macer_serve.issuing import Issuer
from macer_serve.serving.ingress import Ingress
from macer_serve.serving.second_server import require_own_port
from macer_serve.serving.settings import AppSettings
from macer_serve.serving.voter_deployment import VoterDeployment
from macer_serve.serving.voter_model import VoterModel
from macer_serve.serving.withholding import require_writable
from macer_serve.smoothed import require_outputs

log = logging.getLogger("ray.serve")

NO_KEY = (
    "no key_file is configured: a key is made for this start alone. Each start is then a new chance at alpha for every "
    "image, and nobody can know the key beforehand. Make a key with macer key new"
)
_ANSWER_S = 15.0  # for decoding, signing and sending
_WAITING = 4096  # requests of an ingress whose refusal waits until their bodies are read
_QUEUE = 4096  # passes that may wait for a voter
# A lost voter is replaced after the period, a hung one after three timeouts.
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 10.0


def check(settings: AppSettings) -> dict[str, CheckpointConfig]:
    """Returns the configuration of each model, named as it is served. From now on, copies by digest are served.

    Raises `CheckpointError` for a checkpoint that cannot be read or has another digest than the settings name,
    `OutputError` if it cannot be copied, `ParameterError` for a plan that its outputs do not allow, for two names of
    one model, and for a `withheld_dir` that cannot be written, `IssuerKeyError` for a key file that cannot be used.
    """
    configs = {}
    for name, model in settings.models.items():
        config = pin(model.checkpoint, model.digest)
        require_outputs(config, model.plan())
        configs[name] = replace(config, name=name)
    _require_different(configs)
    require_writable(settings.withheld_dir)
    if settings.key_file is not None:
        _issuer(settings.key_file, settings.key_id)
    return configs


def _issuer(key_file: str, key_id: str | None) -> Issuer:
    """Returns the issuer of a key file. Raises `IssuerKeyError` if it cannot be used or holds another key."""
    issuer = Issuer.load(key_file)
    if key_id not in (None, issuer.key_id):
        raise IssuerKeyError(f"{key_file} holds key {issuer.key_id}, not {key_id}: deploy again to change the key")
    return issuer


def _require_different(configs: dict[str, CheckpointConfig]) -> None:
    """Raises `ParameterError` if two names stand for one model.

    Their noise would differ with their plans, bounds or noise streams, and a client who takes the best of two answers
    would be wrong more often than alpha.
    """
    for (name, config), (other, another) in combinations(configs.items(), 2):
        if config.digest == another.digest or set(config.files.values()) & set(another.files.values()):
            raise ParameterError(
                f"models {name} and {other} are one model: their checkpoints have the same weights. A client who takes "
                "the better of two answers about one model is wrong more often than alpha. Serve it under one name"
            )


def build(args: AppSettings) -> Application:
    """Returns the ingress bound to one voter deployment per model.

    Raises `CheckpointError`, `IssuerKeyError` and `ParameterError` here, once, rather than in every replica. Ends
    `serve run` if another server listens on the port.
    """
    require_own_port()
    voters: dict[str, Application] = {}
    configs = check(args)
    for removed in remove_unused():
        log.info("the copy %s of a checkpoint that is not served any more is removed", removed.name)
    aside = 100 if _room_aside(args) else 0
    for name, model in args.models.items():
        voter: Deployment = _deployment(VoterDeployment).options(
            name=f"voter-{name}",
            num_replicas=model.replicas,
            max_ongoing_requests=_QUEUE,
            max_queued_requests=_QUEUE,
            health_check_period_s=_HEALTH_PERIOD_S,
            health_check_timeout_s=_HEALTH_TIMEOUT_S,
            max_surge_percent=aside,
            ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
            logging_config={"enable_access_log": False},  # some forty passes per request
        )
        voters[name] = voter.bind(VoterModel.of(model, configs[name].digest))
    ingress: Deployment = _deployment(Ingress).options(
        name="ingress",
        num_replicas=args.ingress_replicas,
        # The ingress counts the requests in work and answers 429 itself; Serve's own limits lie beyond.
        max_ongoing_requests=args.limits.concurrent + args.limits.uploads + _WAITING,
        max_queued_requests=1024,
        max_surge_percent=100,
        # A replica that is replaced ends when its requests are answered, at their deadlines at the latest.
        graceful_shutdown_timeout_s=max(args.limits.grace_s, args.limits.upload_s + args.limits.timeout_s + _ANSWER_S),
        ray_actor_options={"num_cpus": 0},
    )
    if args.key_file is None:
        log.warning(NO_KEY)
    # One key for all ingress replicas: if each made its own, resending an image would be a second chance at alpha.
    issuer = Issuer.new() if args.key_file is None else _issuer(args.key_file, args.key_id)
    return ingress.bind(args, configs, issuer.to_key_file(), voters)


def voters_need(settings: AppSettings) -> dict[str, float]:
    """Returns the CPUs and GPUs that Ray reserves for all voters."""
    models = settings.models.values()
    return {
        "CPU": math.fsum(model.replicas * model.num_cpus for model in models),
        "GPU": math.fsum(model.replicas * model.num_gpus for model in models),
    }


def _room_aside(settings: AppSettings) -> bool:
    """Returns whether new voters fit beside as many old ones, so that they can be warmed before they replace these."""
    if not ray.is_initialized():
        return True
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    room = all(2 * need <= there.get(kind, 0.0) for kind, need in voters_need(settings).items())
    if not room:
        log.warning(
            "the cluster has no room for new voters beside the old ones. At a change of this deployment, old voters "
            "end before new ones start, and requests wait for these. Reserve less by num_cpus and num_gpus"
        )
    return room


def _deployment(target: type) -> Deployment:
    """`serve.deployment` without options, whose declared type is that of the decorator with options."""
    return cast(Deployment, serve.deployment(target))
