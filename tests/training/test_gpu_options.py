"""Options of GPUs, as far as a CPU can show them: what they set, what is refused, what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import nn

from macer_serve.errors import ParameterError
from macer_serve.training.network import Group, Network
from macer_serve.training.precision import GpuOptions, Precision

CPU = Precision(torch.device("cpu"), "fp32", False, 1)


@pytest.fixture
def globals_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("globals_of_torch")
def test_a_deterministic_run_is_recorded_and_continues_as_such(
    mnist: Path, train: Callable[..., Result], tmp_path: Path
) -> None:
    options = ("--dataset", "mnist", "--data-dir", mnist, "--method", "gaussian", "--epochs", 1, "--held-out", 0)
    result = train(*options, "--deterministic", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert torch.are_deterministic_algorithms_enabled()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["recipe"]["precision"]["deterministic"] is True
    refused = train(*options, "--out", tmp_path / "out")
    assert refused.exit_code != 0
    assert "precision.deterministic was True, now None" in refused.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (GpuOptions(cudnn_benchmark=True), "are for GPUs"),
        (GpuOptions(cuda_graphs=True), "are for GPUs"),
        (GpuOptions(sync_batch_norm=True), "on GPUs only"),
    ],
)
def test_what_only_a_gpu_has_is_refused_on_a_cpu(options: GpuOptions, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        Precision.choose("cpu", "fp32", "off", options)


def test_deterministic_kernels_are_not_chosen_by_timing() -> None:
    with pytest.raises(ParameterError, match="choose one of the two"):
        GpuOptions(deterministic=True, cudnn_benchmark=True)


def test_the_gpus_name_is_part_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    on_gpu = Precision(torch.device("cuda"), "bf16", True, 1, GpuOptions(cudnn_benchmark=True))
    assert on_gpu.to_json() == {
        "device": "cuda", "bf16": True, "compiled": True, "gpu": "NVIDIA H100", "cudnn_benchmark": True
    }  # fmt: skip
    assert CPU.to_json() == {"device": "cpu", "bf16": False, "compiled": False, "threads": 1}


def test_synchronised_batch_normalisation_is_the_same_network_when_it_is_evaluated() -> None:
    """And its state has the same names, so that the checkpoint does not know of it."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    plain[1].running_mean.normal_()
    x, names, before = torch.rand(2, 3, 8, 8), list(plain.state_dict()), plain(torch.ones(1, 3, 8, 8))
    expected = plain(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(plain).eval()
    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    assert list(synchronised.state_dict()) == names
    assert torch.equal(synchronised(x), expected)
    assert torch.equal(synchronised(torch.ones(1, 3, 8, 8)), before)


def test_the_attack_freezes_the_network_once_and_thaws_it_after_an_error() -> None:
    class Counting(nn.Sequential):
        changes = 0

        def train(self, mode: bool = True) -> Counting:
            self.changes += 1
            return super().train(mode)

    model = Counting(nn.Flatten(), nn.Linear(12, 2)).train()
    network, x = Network(model, CPU, Group()), torch.rand(5, 3, 2, 2, requires_grad=True)
    model.changes = 0

    def attack() -> None:
        with network.frozen() as frozen:
            for _ in range(10):
                torch.autograd.grad(frozen(x).sum(), x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attack()
    assert model.changes == 2
    assert model.training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
