"""The engine that a record names, if this machine has it. Only the same function gives the same votes.

A record is written by somebody else. It may choose among this machine's engines, but not how much memory they take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from macer_serve.errors import ParameterError
from macer_serve.hardware import has_gpu
from macer_serve.voters import EngineName, VoterOptions
from macer_serve.voters.opening import default_batch
from macer_serve.voters.options import MAX_BATCH, Device

# A record's engine may take this many times the batch that this machine takes by itself.
MOST_BATCHES = 4


def options_like(engine: str, pixels: int, device: str | None = None) -> VoterOptions:
    """Returns the options that make an engine of the name, or this machine's own if that is no such name.

    `pixels` are height x width of the model input. A batch that `refused_batch` refuses is left to this machine, as is
    bf16, since it is slow if it is emulated. `device` overrules the record's.
    """
    own = VoterOptions(device=cast(Device | None, device))
    try:
        name = EngineName.parse(engine)
        options = replace(name, batch=1).options()
    except ParameterError:
        return own
    if device not in (None, options.device) or (options.device != "cpu" and not has_gpu()):
        return own
    batch = None if refused_batch(engine, pixels) else name.batch
    return replace(options, batch=batch, precision="auto" if options.precision == "bf16" else options.precision)


def same_function(one: str, other: str) -> bool:
    """Returns whether two names are of one function. What draws the copies is no part of it: all draw one stream."""
    try:
        names = [replace(EngineName.parse(name), noise=None) for name in (one, other)]
    except ParameterError:
        return one == other
    return names[0] == names[1]


def refused_batch(engine: str, pixels: int) -> str | None:
    """Returns in words that the batch of an engine's name is too large to be run here; None if it is not."""
    try:
        name = EngineName.parse(engine)
    except ParameterError:
        return None
    most = min(MAX_BATCH, MOST_BATCHES * default_batch(name.device, pixels))
    if name.batch <= most:
        return None
    return f"its batch of {name.batch:,} copies is refused: at most {most:,} copies of this size are run at once here"
