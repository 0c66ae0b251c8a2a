"""What this machine can do, asked in one place."""

from __future__ import annotations

import os

import torch

from macer_serve.errors import EngineError


def usable_cores() -> int:
    """The number of CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pick_device(name: str | None) -> torch.device:
    """The named device, or a GPU where there is one, else the CPU.

    Raises `EngineError` for a GPU that torch does not see, or a name that it does not know.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"device {name!r} is not known; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError("device cuda was asked for, but torch sees no GPU here; use cpu")
    return device


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 arithmetic; without it bf16 is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_amx() -> bool:
    """Whether the CPU has matrix tiles, which only compiled graphs make full use of."""
    return bool(torch.cpu._is_amx_tile_supported())
