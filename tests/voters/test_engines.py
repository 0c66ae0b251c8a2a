"""Engines by name: options, names, what `auto` takes, and how a new one is added."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from cases import classifier_of, voter_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from macer_serve.base_classifier import BaseClassifier, relative_error
from macer_serve.checkpoint import load_checkpoint
from macer_serve.errors import EngineError, ParameterError
from macer_serve.hardware import multiplies_int8
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import EngineName, Task, VoterOptions, open_voter
from macer_serve.voters.engines import Passes, choose
from macer_serve.voters.options import DEVICES, ENGINES, PRECISIONS

HEX = st.text("0123456789abcdef", min_size=16, max_size=16)


@given(
    engine=st.sampled_from(list(ENGINES)),
    device=st.sampled_from(DEVICES),
    precision=st.sampled_from(PRECISIONS[1:]),
    batch=st.integers(1, 99_999),
    fingerprint=HEX,
    compiled=st.booleans(),
    build=st.none() | HEX,
    noise=st.none() | st.just("triton"),
)
def test_a_name_is_read_back_as_it_was_printed(**parts: Any) -> None:
    name = EngineName(**parts)
    assert EngineName.parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    [
        "", "torch", "torch-cpu-fp32-b256", "torch-cpu-fp32-b256:xyz", "torch-cpu-fp32-b0:0123456789abcdef",
        "torch-cpu-auto-b1:0123456789abcdef", "torch-tpu-fp32-b1:0123456789abcdef", "-cpu-fp32-b1:0123456789abcdef",
        "torch-cpu-fp32-b1:0123456789abcdef\n", "torch-cpu-fp32-b999999:0123456789abcdef",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="not the name of an engine"):
        EngineName.parse(text)


def test_a_name_with_parts_that_cannot_be_read_back_is_refused() -> None:
    with pytest.raises(ParameterError):
        EngineName("tor-ch", "cpu", "fp32", 1, "0" * 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "jax"}, "engine must be one of auto, torch, onnx, openvino"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, tensorrt"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, int8"),
        ({"batch": 0}, "batch must be a whole number between 1 and 8,192"),
        ({"batch": 64.0}, "batch must be"),
        ({"workers": -1}, "workers must be"),
        ({"workers": True}, "workers must be"),
    ],
)
def test_options_out_of_range_are_refused_at_construction(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        VoterOptions(**options)


# --- what auto takes --------------------------------------------------------------------------------------------------

MODULE = BaseClassifier((3, 4, 4), 2, load_module=nn.Identity)
QUANTISED = replace(MODULE, int8=b"int8")
GRAPH = BaseClassifier((3, 4, 4), 2, onnx=b"onnx")


@pytest.mark.parametrize(
    ("classifier", "options", "int8", "gpu", "engine", "device", "precision"),
    [
        (MODULE, {}, True, False, "torch", "cpu", "auto"),
        (QUANTISED, {}, True, False, "openvino", "cpu", "int8"),
        (QUANTISED, {}, False, False, "torch", "cpu", "auto"),
        (QUANTISED, {}, True, True, "torch", "cuda", "auto"),
        (QUANTISED, {"device": "cpu"}, True, True, "openvino", "cpu", "int8"),
        (QUANTISED, {"precision": "fp32"}, True, False, "torch", "cpu", "fp32"),
        (QUANTISED, {"precision": "int8"}, False, False, "openvino", "cpu", "int8"),
        (QUANTISED, {"engine": "torch"}, True, False, "torch", "cpu", "auto"),
        (QUANTISED, {"engine": "openvino"}, False, False, "openvino", "cpu", "int8"),
        (MODULE, {"engine": "openvino"}, True, False, "openvino", "cpu", "fp32"),
        (GRAPH, {}, True, False, "onnx", "cpu", "auto"),
        (GRAPH, {}, True, True, "onnx", "cuda", "auto"),
        (MODULE, {"device": "tensorrt"}, True, True, "onnx", "tensorrt", "auto"),
    ],
)
def test_auto_follows_from_hardware_and_files(
    classifier: BaseClassifier,
    options: dict[str, Any],
    int8: bool,
    gpu: bool,
    engine: str,
    device: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("macer_serve.voters.engines.multiplies_int8", lambda: int8)
    monkeypatch.setattr("macer_serve.voters.engines.has_gpu", lambda: gpu)
    chosen = choose(classifier, VoterOptions(**options))
    assert (chosen.engine, chosen.device, chosen.precision) == (engine, device, precision)


def test_without_openvino_the_int8_file_is_left_aside_with_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("macer_serve.voters.engines.multiplies_int8", lambda: True)
    monkeypatch.setattr("macer_serve.voters.engines._installed", lambda package: False)
    assert choose(QUANTISED, VoterOptions(device="cpu")).engine == "torch"
    assert "OpenVINO is not installed" in caplog.text
    assert choose(QUANTISED, VoterOptions(device="cpu", precision="int8")).engine == "onnx"


def test_the_bundled_checkpoint_runs_int8_here_without_torch() -> None:
    """A voter that does not compile needs no torch: half of a cold start."""
    if not multiplies_int8():
        pytest.skip("this CPU does not multiply int8")
    import subprocess

    code = (
        "import sys\nfrom macer_serve.smoothed import SmoothedClassifier\n"
        "g = SmoothedClassifier.load('bundled:cifar10')\n"
        "assert g.voter.engine.startswith('openvino-cpu-int8-b256:'), g.voter.engine\n"
        "assert g.voter.batch_sizes == (64, 256), g.voter.batch_sizes\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- what an engine cannot do -----------------------------------------------------------------------------------------


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "torch", "precision": "int8"}, "torch computes in fp32, bf16, not int8"),
        ({"engine": "onnx", "precision": "bf16"}, "onnx computes in fp32, int8, not bf16"),
        ({"engine": "onnx", "precision": "int8"}, "run macer quantize"),
        ({"engine": "openvino", "device": "cuda"}, "openvino runs on cpu, not on cuda"),
        ({"engine": "torch", "device": "tensorrt"}, "torch runs on cpu or cuda, not on tensorrt"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        voter_of(linear(), input_shape=(3, 4, 4), sigma=0.25, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(("device", "needs"), [("cuda", "CUDA and cuDNN"), ("tensorrt", "TensorRT")])
def test_a_silent_fallback_of_onnxruntime_is_refused(
    device: str, needs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """`get_available_providers` lists CUDA even here; the session says what it got."""
    with pytest.raises(EngineError, match=f"fell back to CPUExecutionProvider from .*{needs}"):
        voter_of(linear(), input_shape=(3, 4, 4), sigma=0.25, engine="onnx", device=device)
    assert "CUDAExecutionProvider" in onnxruntime.get_available_providers() or device == "tensorrt"


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize(
    ("graph", "words"), [(b"not a graph", "cannot be read"), (b"", r"maps \[\] to \[\]; pixels to logits is needed")]
)
def test_a_graph_that_is_none_is_refused(engine: str, graph: bytes, words: str) -> None:
    classifier = BaseClassifier((3, 4, 4), 2, onnx=graph, load_module=linear)
    with pytest.raises(EngineError, match=words):
        open_voter(classifier, sigma=0.25, options=VoterOptions(engine=engine, device="cpu"))


def test_a_graph_of_another_function_than_the_module_is_refused() -> None:
    graph = classifier_of(linear(), (3, 4, 4)).graph()
    torch.manual_seed(9)
    other = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    classifier = BaseClassifier((3, 4, 4), 3, load_module=lambda: other, onnx=graph)
    for engine in ("onnx", "openvino"):
        with pytest.raises(EngineError, match="does not compute the base classifier"):
            open_voter(classifier, sigma=0.25, options=VoterOptions(engine=engine, device="cpu", batch=16))


def test_an_int8_file_of_another_network_is_another_base_classifier_but_a_whole_one() -> None:
    """int8 is compared with onnxruntime's run of the same file: it is a base classifier of its own."""
    if not multiplies_int8():
        pytest.skip("this CPU does not multiply int8, and OpenVINO's sums of products saturate")
    _, bundled = load_checkpoint("bundled:cifar10")
    options = VoterOptions(precision="int8", device="cpu", batch=32, workers=1)
    engines = []
    for engine in ("onnx", "openvino"):
        with open_voter(bundled, sigma=0.25, options=replace(options, engine=engine)) as voter:
            engines.append(voter.engine.rpartition(":")[0])
    assert engines == ["onnx-cpu-int8-b32", "openvino-cpu-int8-b32"]


def test_relative_errors() -> None:
    plain = np.array([[3.0, -4.0], [1.0, 2.0]], np.float32)
    assert relative_error(plain, plain) == 0.0
    assert relative_error(-plain, plain) > 2.0
    assert relative_error(plain * 0, plain * 0) == 0.0
    # A masked class, and an offset that all classes have, hide nothing.
    masked = np.concatenate([plain, np.full((2, 1), -1e9, np.float32)], axis=1)
    assert relative_error(masked + np.array([0, 1, 0], np.float32), masked) > 0.1
    assert relative_error(plain[::-1] + 1e3, plain + 1e3) > 1.0
    assert relative_error(plain, plain * np.float32("nan")) == float("inf")
    assert relative_error(plain[:, :1], plain) == float("inf")


# --- a fourth engine: one file and one entry of a table ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumpyEngine:
    """Linear logits by NumPy, exact for integers below 2^53."""

    weights: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]
    scale: float
    device: str = "cpu"
    precision: str = "fp32"
    compiled: bool = False
    build: str | None = None
    tolerance: float = 1e-5
    source: None = None

    def start_thread(self) -> None:
        pass

    def logits(self, copies: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        # einsum adds each row in the same order, wherever it stands; a matrix product would not.
        return np.einsum("khwc,chwo->ko", copies * self.scale, self.weights).astype(np.float32) + self.bias

    def plain_logits(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.einsum("kchw,chwo->ko", pixels, self.weights).astype(np.float32) + self.bias

    def seal(self) -> None:
        pass


def open_engines(classifier: BaseClassifier, options: VoterOptions, passes: Passes) -> Iterator[NumpyEngine]:
    layer = classifier.module().get_submodule("1")
    weights = layer.weight.detach().double().numpy().T.reshape(*classifier.input_shape, -1)  # type: ignore[union-attr]
    yield NumpyEngine(weights, layer.bias.detach().float().numpy(), passes.scale)  # type: ignore[union-attr]


def test_a_fourth_engine_is_one_file_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    file = types.ModuleType("numpy_engine")
    file.open_engines = open_engines  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "numpy_engine", file)
    monkeypatch.setitem(ENGINES, "numpy", "numpy_engine")
    task = Task(np.full((4, 4, 3), 128 << 18, np.int32), bytes(16), Draw("estimation", 0, 500))
    counted = []
    for engine in ("numpy", "torch"):
        with voter_of(
            linear(), input_shape=(3, 4, 4), sigma=0.25, engine=engine, batch=128, precision="fp32", compile=False
        ) as voter:
            assert EngineName.parse(voter.engine).engine == engine
            counted.append(voter.submit([task]).result()[0])
    np.testing.assert_array_equal(*counted)


CLOSED_BY_OTHERS = """
import gc, signal, subprocess, threading
import torch
from cases import voter_of

network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
opened = []

def open_one():
    opened.append(voter_of(network, input_shape=(3, 4, 4), sigma=0.25, engine="openvino", workers=1))

def close_all():
    while opened:
        opened.pop(0).close()
        gc.collect()

open_one()
open_one()
closer = threading.Thread(target=close_all)
closer.start()
closer.join()
signal.signal(signal.SIGCHLD, lambda number, frame: None)
for _ in range(3):
    subprocess.run(["true"], check=True)
print("alive")
"""


def test_signals_are_survived_after_voters_were_closed_in_any_order_and_thread() -> None:
    """On a CPU with AMX, OpenVINO leaves a thread without a stack for signals if its core is closed by another one."""
    pytest.importorskip("openvino")
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_BY_OTHERS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "alive" in done.stdout


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_an_engine_without_its_package_says_which_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"openvino": "openvino", "onnx": "onnxruntime"}[name]
    for loaded in [m for m in sys.modules if m.split(".")[0] == package or m == ENGINES[name]]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=f"needs the package {package}, .* pip install {package}"):
        voter_of(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), input_shape=(3, 4, 4), sigma=0.25, engine=name)
