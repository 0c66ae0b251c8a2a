"""What Ray reads from the environment of the process that starts it. This module must not import Ray."""

from __future__ import annotations

import os

from macer_serve import ray_cluster

# A request passes three processes. By gRPC, and without further threads in them, that takes little more than half the
# time.
BY_GRPC = {
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # 4 MiB would hold no soft votes of 1,000 classes
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
ENVIRONMENT = {
    **ray_cluster.ENVIRONMENT,
    **BY_GRPC,
    # A Ray instance of this machine alone, which listens on the loopback address. The name is that of Ray's switch for
    # the systems on which this is the default.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "macer_serve.serving.ports:guard_proxy",
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1",  # a voter that cannot start now cannot start in a second
    "RAY_USAGE_STATS_ENABLED": "0",
}


def prepare() -> None:
    """Sets `ENVIRONMENT` for `macer serve`; what the user has set stands. Must precede `import ray`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
