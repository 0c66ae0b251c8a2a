"""A model server whose every answer carries a proof: certified inference by randomized smoothing.

    from macer_serve import Plan, SmoothedClassifier

    g = SmoothedClassifier.load("bundled:cifar10")
    certificate = g.certify("frog.png", Plan(n=10_000))

The names below are imported when they are first used, so that `import macer_serve` loads nothing else.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from macer_serve.version import __version__

# MKL reads this before its first product. Otherwise the last bits of small products depend on where a row lies in
# memory, and so on a copy's position in the batch. An engine with such products is refused.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    from macer_serve.checkpoint import load_checkpoint
    from macer_serve.errors import MacerError
    from macer_serve.smoothed import SmoothedClassifier
    from macer_serve.smoothing.certificate import Certificate
    from macer_serve.smoothing.plan import Plan
    from macer_serve.verification import verify
    from macer_serve.voters import VoterOptions

_HOMES = {
    "Certificate": "macer_serve.smoothing.certificate",
    "MacerError": "macer_serve.errors",
    "Plan": "macer_serve.smoothing.plan",
    "SmoothedClassifier": "macer_serve.smoothed",
    "VoterOptions": "macer_serve.voters",
    "load_checkpoint": "macer_serve.checkpoint",
    "verify": "macer_serve.verification",
}

__all__ = [
    "Certificate",
    "MacerError",
    "Plan",
    "SmoothedClassifier",
    "VoterOptions",
    "__version__",
    "load_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
