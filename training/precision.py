"""The device, arithmetic, compilation and threads of a run."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from macer_serve.errors import ParameterError, TrainingError
from macer_serve.hardware import has_amx, multiplies_bf16, pick_device

Arithmetic = Literal["bf16", "tf32", "fp32"]


@dataclass(frozen=True, slots=True)
class GpuOptions:
    """What a run asks of a GPU, all of it recorded. Raises `ParameterError` for choices that exclude each other.

    `deterministic` takes only kernels whose results repeat bit for bit; on a CPU all do. `cudnn_benchmark` lets cuDNN
    choose its kernels by timing. `cuda_graphs` replays the compiled network's kernels as one graph. `sync_batch_norm`
    takes the statistics of batch normalisation over all workers.
    """

    deterministic: bool = False
    cudnn_benchmark: bool = False
    cuda_graphs: bool = False
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.deterministic and self.cudnn_benchmark:
            raise ParameterError(
                "a kernel that is chosen by timing may be another one in the next run; choose one of the two",
                settings=("deterministic", "cudnn_benchmark"),
            )


@dataclass(frozen=True, slots=True)
class Precision:
    """How a run computes. It is fixed for the run, since each choice gives other bits.

    `bf16` is autocast with fp32 weights. `tf32` rounds the inputs of fp32 products to 10 bits, on GPUs. fp32 is exact.
    """

    device: torch.device
    arithmetic: Arithmetic
    compiled: bool
    threads: int
    gpu: GpuOptions = GpuOptions()

    @classmethod
    def choose(
        cls,
        device: str | None,
        arithmetic: str,
        compile_: str,
        gpu: GpuOptions = GpuOptions(),  # frozen
    ) -> Precision:
        """Returns the fastest choice for this machine, with the given parts of it fixed.

        That is bf16 if the hardware multiplies it, and compilation on GPUs and AMX. Raises `ParameterError` for tf32
        without a GPU, and `TrainingError` for compilation without a compiler.
        """
        chosen = pick_device(device)
        compiler = _compiler(chosen)
        if compile_ == "on" and compiler is None:
            raise TrainingError(
                "compiling needs a C++ compiler (g++, or the one CXX names); install it, or train uncompiled",
                settings=("compile",),
            )
        if arithmetic == "auto":
            arithmetic = "bf16" if multiplies_bf16(chosen) else "tf32" if chosen.type == "cuda" else "fp32"
        if arithmetic == "tf32" and chosen.type != "cuda":
            raise ParameterError("tf32 is a GPU's arithmetic; use bf16 or fp32 on a CPU", settings=("precision",))
        if gpu.sync_batch_norm and chosen.type != "cuda":
            raise ParameterError(
                "torch synchronises batch normalisation on GPUs only; train on GPUs, or without it",
                settings=("sync_batch_norm",),
            )
        if (gpu.cudnn_benchmark or gpu.cuda_graphs) and chosen.type != "cuda":
            raise ParameterError(
                "cuDNN's timings and CUDA graphs are for GPUs; train on a GPU, or without them",
                settings=("cudnn_benchmark", "cuda_graphs"),
            )
        if gpu.cuda_graphs and (compile_ == "off" or compiler is None):
            raise ParameterError(
                "CUDA graphs are made of the compiled network; compile it, or train without them",
                settings=("cuda_graphs", "compile"),
            )
        return cls(
            chosen,
            arithmetic,  # type: ignore[arg-type]  # one of the command's choices
            compile_ == "on" or (compile_ == "auto" and compiler is not None and (chosen.type == "cuda" or has_amx())),
            torch.get_num_threads(),
            gpu,
        )

    @property
    def bf16(self) -> bool:
        return self.arithmetic == "bf16"

    def apply(self) -> None:
        """Sets torch's threads and the flags of its kernels, which are global to a process. cuDNN's default is tf32."""
        torch.set_num_threads(self.threads)
        if self.gpu.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        if self.gpu.cudnn_benchmark:
            torch.backends.cudnn.benchmark = True
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.arithmetic == "tf32"

    def to_json(self) -> dict[str, Any]:
        cpu = {"threads": self.threads} if self.device.type == "cpu" else {}
        tf32 = {"tf32": True} if self.arithmetic == "tf32" else {}
        # Another GPU has other kernels, and so other bits.
        gpu = {"gpu": torch.cuda.get_device_name()} if self.device.type == "cuda" else {}
        options = {name: True for name, value in asdict(self.gpu).items() if value}
        return {
            "device": self.device.type,
            "bf16": self.bf16,
            **tf32,
            "compiled": self.compiled,
            **cpu,
            **gpu,
            **options,
        }


def _compiler(device: torch.device) -> str | None:
    """Returns the compiler that torch.compile would call, or None. Without it, the first step would fail."""
    if device.type == "cuda":  # Triton builds its launchers with a C compiler
        names = [os.environ["CC"]] if "CC" in os.environ else ["clang", "gcc"]
    else:
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    return next((path for name in names if (path := shutil.which(name))), None)
