"""The engine that a record names, if this machine has it. Only the same function gives the same votes."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from macer_serve.errors import ParameterError
from macer_serve.hardware import has_gpu
from macer_serve.voters import EngineName, VoterOptions
from macer_serve.voters.options import Device


def options_like(engine: str, device: str | None = None) -> VoterOptions:
    """Returns the options that make an engine of the name, or this machine's own if that is no such name.

    bf16 stays this machine's choice, since it is slow if it is emulated. `device` overrules the record's.
    """
    own = VoterOptions(device=cast(Device | None, device))
    try:
        options = EngineName.parse(engine).options()
    except ParameterError:
        return own
    if device not in (None, options.device) or (options.device != "cpu" and not has_gpu()):
        return own
    return replace(options, precision="auto") if options.precision == "bf16" else options
