"""What this machine can do, asked in one place. Only functions that speak of torch's devices import torch."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from macer_serve.errors import EngineError

if TYPE_CHECKING:
    import torch


def usable_cores() -> int:
    """Returns the number of CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_gpu() -> bool:
    """Returns whether there is a GPU that torch can use. Imports torch only if the driver shows one."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return False
    import torch

    return torch.cuda.is_available()


def multiplies_int8() -> bool:
    """Returns whether the CPU has VNNI or AMX instructions; without them int8 is not faster than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        import torch

        return bool(torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())
    return any(f" {flag}" in flags for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


def pick_device(name: str | None) -> torch.device:
    """Returns torch's device of the name, or a GPU if there is one, else the CPU.

    Raises `EngineError` for a GPU that torch does not see, or a name that it does not know.
    """
    import torch

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
    """Returns whether the hardware has bf16 arithmetic; without it bf16 is slower than fp32."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def has_amx() -> bool:
    """Returns whether the CPU has matrix tiles, which only compiled graphs make full use of."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())
