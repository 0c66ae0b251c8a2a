"""The app builder: `serve run deployments/smoothed.yaml` calls `build` with the YAML's args."""

# No postponed annotations here: Ray reads the class of `args` off the builder's signature.
import logging
from dataclasses import replace
from itertools import combinations
from typing import cast

from ray import serve
from ray.serve import Application, Deployment

from macer_serve.checkpoint import CheckpointConfig, load_config, resolve
from macer_serve.checkpoint.folder import read_file
from macer_serve.errors import ParameterError
from macer_serve.issuing import Issuer
from macer_serve.serving.ingress import Ingress
from macer_serve.serving.second_server import require_own_port
from macer_serve.serving.settings import AppSettings
from macer_serve.serving.voter_replica import VoterReplica
from macer_serve.smoothed import require_outputs

log = logging.getLogger("ray.serve")

NO_KEY = (
    "no key_file is configured: a key is made for this start alone. Each start is then a new chance at alpha for every "
    "image, and nobody can know the key beforehand. Make a key with macer key new"
)
_QUEUE = 4096  # draws that may wait for a voter; each is one pass at most


def check(settings: AppSettings, *, files: bool = False) -> dict[str, CheckpointConfig]:
    """Returns the configuration of each model, named as it is served.

    Raises `CheckpointError` for a checkpoint that cannot be read. Raises `ParameterError` for a plan that its outputs
    do not allow and for two names of one model, `IssuerKeyError` for a key file that cannot be used. With `files`,
    checks the digest of every file of the checkpoints, too.
    """
    configs = {}
    for name, model in settings.models.items():
        config = replace(load_config(model.checkpoint), name=name)
        require_outputs(config, model.plan())
        if files:
            for file in config.files:
                read_file(resolve(model.checkpoint), config, file)
        configs[name] = config
    _require_different(configs)
    if settings.key_file is not None:
        Issuer.load(settings.key_file)
    return configs


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
    for name, model in args.models.items():
        voter: Deployment = _deployment(VoterReplica).options(
            name=f"voter-{name}",
            num_replicas=model.replicas,
            max_ongoing_requests=_QUEUE,
            max_queued_requests=_QUEUE,
            ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
            logging_config={"enable_access_log": False},  # some forty passes per request
        )
        voters[name] = voter.bind(model)
    ingress: Deployment = _deployment(Ingress).options(
        name="ingress",
        # The ingress counts the requests in work and answers 429 itself; Serve's own limits lie beyond.
        max_ongoing_requests=args.limits.concurrent + 256,
        max_queued_requests=1024,
        ray_actor_options={"num_cpus": 0},
    )
    if args.key_file is None:
        log.warning(NO_KEY)
    # One key for all ingress replicas: if each made its own, resending an image would be a second chance at alpha.
    issuer = Issuer.new() if args.key_file is None else Issuer.load(args.key_file)
    return ingress.bind(args, configs, issuer.to_key_file(), voters)


def _deployment(target: type) -> Deployment:
    """`serve.deployment` without options, whose declared type is that of the decorator with options."""
    return cast(Deployment, serve.deployment(target))
