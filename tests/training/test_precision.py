"""How a run is computed is chosen as documented, set where torch keeps it, and recorded in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from torch import nn

from macer_serve.errors import ParameterError, TrainingError
from macer_serve.training import precision
from macer_serve.training.network import Group, Network
from macer_serve.training.precision import Precision

Train = Callable[..., Result]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
COMPILED_ON_GPU = {"device": "cuda", "bf16": False, "compiled": True, "gpu": "a GPU's name"}
QUICK = ("--dataset", "mnist", "--method", "gaussian", "--epochs", 1, "--batch", 16)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `Precision.choose` see the machine described."""

    def describe(device: torch.device, *, bf16: bool = False, amx: bool = False, compiler: str | None = None) -> None:
        monkeypatch.setattr(precision, "pick_device", lambda name: device)
        monkeypatch.setattr(precision, "multiplies_bf16", lambda device: bf16)
        monkeypatch.setattr(precision, "has_amx", lambda: amx)
        monkeypatch.setattr(precision.shutil, "which", lambda name: compiler)

    return describe


@pytest.fixture
def torch_settings() -> Iterator[None]:
    threads, matmul, cudnn = torch.get_num_threads(), torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("device", "bf16", "chosen"), [(GPU, True, "bf16"), (GPU, False, "tf32"), (CPU, True, "bf16"), (CPU, False, "fp32")]
)
def test_auto_is_what_the_hardware_multiplies_fastest(machine: Any, device: Any, bf16: bool, chosen: str) -> None:
    machine(device, bf16=bf16)
    assert Precision.choose(None, "auto", "off").arithmetic == chosen


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    ("device", "asked"), [(GPU, "bf16"), (GPU, "tf32"), (GPU, "fp32"), (CPU, "bf16"), (CPU, "fp32")]
)
def test_what_is_asked_for_is_chosen_whatever_the_hardware(machine: Any, device: Any, bf16: bool, asked: str) -> None:
    machine(device, bf16=bf16)
    chosen = Precision.choose(None, asked, "off")
    assert (chosen.arithmetic, chosen.bf16) == (asked, asked == "bf16")


def test_tf32_on_a_cpu_is_refused_before_anything_is_written(mnist: Path, train: Train, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="use bf16 or fp32 on a CPU"):
        Precision.choose("cpu", "tf32", "off")
    refused = train(*QUICK, "--data-dir", mnist, "--precision", "tf32", "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "tf32 is a GPU's arithmetic; use bf16 or fp32 on a CPU (--precision)" in refused.output
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("device", "amx", "compiler", "compiled"),
    [
        (GPU, False, "/usr/bin/cc", True),
        (GPU, False, None, False),
        (CPU, True, "/usr/bin/c++", True),
        (CPU, True, None, False),
        (CPU, False, "/usr/bin/c++", False),
    ],
)
def test_compilation_is_where_it_pays_and_can_be_done(
    machine: Any, device: Any, amx: bool, compiler: str | None, compiled: bool
) -> None:
    machine(device, amx=amx, compiler=compiler)
    assert Precision.choose(None, "fp32", "auto").compiled == compiled
    assert not Precision.choose(None, "fp32", "off").compiled
    if compiler:
        assert Precision.choose(None, "fp32", "on").compiled
    else:
        with pytest.raises(TrainingError, match="train uncompiled"):
            Precision.choose(None, "fp32", "on")


@pytest.mark.parametrize("arithmetic", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.usefixtures("torch_settings")
def test_products_on_a_gpu_are_tf32_where_asked_and_nowhere_else(arithmetic: Any, before: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = cudnn.allow_tf32 = before
    Precision(CPU, "fp32", False, 1).apply()
    assert (matmul.allow_tf32, cudnn.allow_tf32) == (before, before), "no business of a run on a CPU"
    Precision(GPU, arithmetic, False, 1).apply()
    assert (matmul.allow_tf32, cudnn.allow_tf32) == (arithmetic == "tf32", arithmetic == "tf32")


@pytest.mark.usefixtures("torch_settings")
def test_the_threads_are_those_it_was_chosen_with() -> None:
    torch.set_num_threads(2)
    chosen = Precision.choose("cpu", "fp32", "off")
    torch.set_num_threads(1)
    chosen.apply()
    assert torch.get_num_threads() == chosen.threads == 2


@pytest.mark.parametrize(
    ("chosen", "record"),
    [
        (Precision(CPU, "fp32", False, 3), {"device": "cpu", "bf16": False, "compiled": False, "threads": 3}),
        (Precision(CPU, "bf16", True, 3), {"device": "cpu", "bf16": True, "compiled": True, "threads": 3}),
        (
            Precision(GPU, "tf32", True, 3),
            COMPILED_ON_GPU | {"tf32": True},
        ),
        (Precision(GPU, "fp32", True, 3), COMPILED_ON_GPU),
    ],
)
def test_the_record_says_all_that_changes_bits(
    monkeypatch: pytest.MonkeyPatch, chosen: Precision, record: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU's name")
    assert chosen.to_json() == record


def test_bf16_products_with_fp32_weights_and_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
    x, logits = torch.rand(5, 1, 8, 8), {}
    for arithmetic in ("bf16", "fp32"):
        network = Network(model, Precision(CPU, arithmetic, False, 1), Group())  # type: ignore[arg-type]
        logits[arithmetic] = network(x)
        logits[arithmetic].float().sum().backward()
        assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters())
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert (logits["bf16"].dtype, logits["fp32"].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(logits["fp32"], model(x)), "fp32 is the model's own arithmetic"
    torch.testing.assert_close(logits["bf16"].float(), logits["fp32"], rtol=0.02, atol=0.02)


def test_the_checkpoint_says_how_it_was_computed(mnist: Path, train: Train, tmp_path: Path) -> None:
    """bf16 works where the hardware must emulate it, too."""
    weights = {}
    for asked in ("fp32", "bf16"):
        out = tmp_path / asked
        result = train(*QUICK, "--data-dir", mnist, "--precision", asked, "--out", out)
        assert result.exit_code == 0, result.output
        recorded = json.loads((out / "config.json").read_text())["recipe"]["precision"]
        assert recorded == {"device": "cpu", "bf16": asked == "bf16", "compiled": False, "threads": 1}
        weights[asked] = load_file(out / "model.safetensors")
        assert all(value.dtype == torch.float32 for value in weights[asked].values())
    assert any(not torch.equal(weights["bf16"][name], value) for name, value in weights["fp32"].items())
    for name, value in weights["fp32"].items():
        torch.testing.assert_close(weights["bf16"][name], value, rtol=0, atol=1e-3)
