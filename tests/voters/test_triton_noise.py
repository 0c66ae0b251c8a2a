"""The noise kernel draws the specified integers, compiles for GPUs, and its votes are those of the host's noise.

No GPU is needed: the kernel runs by Triton's interpreter, in processes of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from macer_serve.smoothing.noise import ExactNoise, noise_for
from macer_serve.voters.copies import device_copies

triton = pytest.importorskip("triton", reason="Triton has no wheel for this system")
HERE = Path(__file__).parent


def interpreted(program: str, *arguments: object) -> str:
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_draws_the_specified_integers() -> None:
    """`results/gpu/kernel-noise.txt` has the run over a million coordinates."""
    assert interpreted("kernel_noise.py", 17, 19, 3, 1, 64, 0).endswith("\n19,380 coordinates, 0 differ\n")


def test_votes_are_those_of_the_hosts_noise_and_a_damaged_table_is_refused() -> None:
    *names, refusal = interpreted("interpreted_votes.py").splitlines()
    assert [name.partition(":")[0] for name in names] == [
        "torch-cpu-fp32-noisetriton-b32", "onnx-cpu-fp32-noisetriton-b32"
    ]  # fmt: skip
    assert refusal == "refused: the noise kernel of this device does not give the specified stream"


@pytest.mark.parametrize(("capability", "lattice"), [(80, False), (90, False), (90, True)])
def test_the_kernel_compiles_for_gpus_and_rounds_after_each_operation(capability: int, lattice: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from macer_serve.voters.triton_noise import BLOCKS, OPTIONS, constants_of, noisy_copies

    types = ("*i16", "*i32", "*u64", "*u64", "*fp64", "*i16", "*i32", "i32")
    constants = {**constants_of(ExactNoise(0.25), BLOCKS), "lattice": lattice}
    signature = dict(zip(noisy_copies.arg_names, (*types, *["constexpr"] * len(constants)), strict=True))
    kernel = triton.compile(
        ASTSource(noisy_copies, signature, constants), target=GPUTarget("cuda", capability, 32), options=OPTIONS
    )
    assert kernel.asm["cubin"].startswith(b"\x7fELF")
    doubles = set(re.findall(r"\b(?:add|sub|mul|fma|mad)\S*\.f64", kernel.asm["ptx"]))
    assert doubles == (set() if lattice else {"add.rn.f64", "mul.rn.f64"})


def test_without_a_gpu_the_host_draws_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert device_copies(noise_for("exact", 0.25), (4, 4, 3), "cpu") is None
    assert not caplog.text
    assert device_copies(noise_for("exact", 0.25), (4, 4, 3), "cuda") is None
    assert "torch sees no GPU" in caplog.text


def test_the_papers_noise_is_drawn_by_the_host(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert device_copies(noise_for("gaussian", 0.25), (4, 4, 3), "cuda") is None
    assert "gaussian/1 is drawn on the host" in caplog.text
