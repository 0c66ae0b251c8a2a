"""The policy: everything that must be fixed before the votes of an input can be computed.

Whoever could choose another policy after seeing the votes would have another chance at alpha. So the digest of the
policy enters the noise seed: under another policy the input meets other noise. A request may still choose its radius,
tolerance, cap and alpha. The bounds of a policy hold at all looks together, and are nested in alpha.
"""

from __future__ import annotations

import hashlib
from typing import Any

from macer_serve.smoothing import mixture
from macer_serve.smoothing.canonical import canonical_json
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.selection import REFERENCE_ALPHA

POLICY_VERSION = 1


def policy_of(plan: Plan, noise: str) -> dict[str, Any]:
    """Returns the policy of a plan under the noise stream of that name, as JSON values."""
    groups = {} if plan.hierarchy is None else {"hierarchy": plan.hierarchy.to_json(), "reference": REFERENCE_ALPHA}
    return {
        **groups,
        "version": POLICY_VERSION,
        "mode": plan.mode,
        "bound": plan.bound,
        "n0": plan.selection,
        "n": plan.n,
        "beta": plan.soft_beta,
        "alpha_fractions": plan.alpha_fractions,
        "mixture": mixture.STAKES if "mixture" in plan.alpha_fractions else None,
        "noise": noise,
    }


def policy_digest(plan: Plan, noise: str) -> str:
    """Returns `sha256:` and the digest of the policy's canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical_json(policy_of(plan, noise))).hexdigest()
