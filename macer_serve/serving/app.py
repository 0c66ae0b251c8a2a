"""The app builder: `serve run deployments/smoothed.yaml` calls `build` with the YAML's args."""

# No postponed annotations here: Ray reads the class of `args` off the builder's signature.
import logging
from pathlib import Path
from typing import cast

from ray import serve
from ray.serve import Application, Deployment

from macer_serve.checkpoint import load_config
from macer_serve.errors import ParameterError
from macer_serve.serving.ingress import Ingress
from macer_serve.serving.settings import AppSettings
from macer_serve.serving.voter_replica import VoterReplica
from macer_serve.smoothed import require_outputs
from macer_serve.smoothing.seeds import check_secret, new_secret

log = logging.getLogger("ray.serve")

_QUEUE = 4096  # draws that may wait for a voter; each is one pass at most


def build(args: AppSettings) -> Application:
    """The ingress bound to one voter deployment a model.

    Raises `CheckpointError` and `ParameterError` here, once, rather than in every replica.
    """
    voters: dict[str, Application] = {}
    for name, model in args.models.items():
        require_outputs(load_config(model.checkpoint), model.plan())
        voter: Deployment = _deployment(VoterReplica).options(
            name=f"voter-{name}",
            num_replicas=model.replicas,
            max_ongoing_requests=_QUEUE,
            max_queued_requests=_QUEUE,
            ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
            logging_config={"enable_access_log": False},  # some forty passes a request
        )
        voters[name] = voter.bind(model)
    ingress: Deployment = _deployment(Ingress).options(
        name="ingress",
        # The places are counted in the ingress, which answers 429 itself; Serve's own limits lie beyond.
        max_ongoing_requests=args.limits.concurrent + 256,
        max_queued_requests=1024,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(args, _secret(args.secret_file), voters)


def _deployment(target: type) -> Deployment:
    """`serve.deployment` without options, whose declared type is that of the decorator with options."""
    return cast(Deployment, serve.deployment(target))


def _secret(path: str | None) -> bytes:
    """The operator's secret, or a fresh one: drawn here, once, since one a replica would be a redraw."""
    if path is None:
        log.warning(
            "no secret_file is configured: a fresh secret is used, and certificates of this start "
            "cannot be verified with a secret after it"
        )
        return new_secret()
    try:
        return check_secret(Path(path).read_bytes().strip())
    except (OSError, ParameterError) as error:
        raise ParameterError(f"secret_file {path}: {getattr(error, 'strerror', None) or error}") from error
