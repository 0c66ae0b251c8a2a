"""An engine like a record's own, as far as this machine has one: only the same function gives the same votes."""

from __future__ import annotations

import re
from typing import Any

_NAME = re.compile(r"torch-(cpu|cuda)-(bf16|fp32)(-compiled)?(?:-t1)?-b(\d{1,4}):[0-9a-f]{16}")


def voter_options(engine: str, device: str | None = None) -> dict[str, Any]:
    """The options of `TorchVoter` that make an engine of the name; the machine's own where it is no such name.

    bf16 stays this machine's choice: emulated, it is slow.
    """
    options: dict[str, Any] = {"device": device}
    named = _NAME.fullmatch(engine)
    if named is None or device not in (None, named[1]) or not 1 <= int(named[4]) <= 8192:
        return options
    if named[1] == "cuda":
        import torch

        if not torch.cuda.is_available():
            return options
    options |= {"device": named[1], "compile": named[3] is not None, "batch": int(named[4])}
    return options | ({"precision": "fp32"} if named[2] == "fp32" else {})
