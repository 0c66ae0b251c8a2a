"""Fine-tuning: a torchvision network from a file of weights learns a folder of photographs, and is certified."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import densenet121, resnet18, squeezenet1_1

from macer_serve.checkpoint import load_model
from macer_serve.checkpoint.fitting import head_tensors
from macer_serve.cli import main
from macer_serve.datasets import dataset_info
from macer_serve.errors import CheckpointError, ParameterError
from macer_serve.training.initial import Initial, initial_model

pytestmark = pytest.mark.usefixtures("one_thread")
Train = Callable[..., Result]
State = dict[str, Tensor]
PHOTOGRAPHS = Path(__file__).parents[1] / "images"
CLASSES = ("automobile", "frog", "ship")
RESNET18 = ("--arch", "torchvision:resnet18", "--dataset", "folder", "--size", 32, "--method", "gaussian")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """An ImageFolder tree of three classes, of six and two crops each; each class's are crops of one photograph."""
    for photograph in PHOTOGRAPHS.glob("*.png"):
        name = photograph.stem.partition("-")[2]
        if name in CLASSES:
            pixels = np.asarray(Image.open(photograph).convert("RGB"))
            for number in range(8):
                folder = tmp_path / "photographs" / ("train" if number < 6 else "val") / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[number % 4 :, number % 3 :]).save(folder / f"{number}.png")
    return tmp_path / "photographs"


@pytest.fixture(scope="module")
def weights() -> State:
    """The state dict of a ResNet-18 of ten classes; training elsewhere has moved its running statistics."""
    torch.manual_seed(7)
    network = resnet18(num_classes=10)
    network(torch.rand(4, 3, 32, 32))
    return dict(network.state_dict())


@pytest.fixture
def file(weights: State, tmp_path: Path) -> Path:
    torch.save(weights, tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


def initial(file: Path, classes: int = 3, architecture: str = "torchvision:resnet18") -> Initial:
    return initial_model(
        architecture,
        classes=tuple("abcdefghijklmnopq"[:classes]),
        input_shape=(3, 32, 32),
        info=dataset_info("folder"),
        seed=0,
        init=str(file),
    )


def network_of(start: Initial) -> State:
    assert isinstance(start.model, nn.Sequential)
    return start.model[1].state_dict()


def macer(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_a_pretrained_network_is_trained_certified_exported_and_quantised(
    train: Train, photographs: Path, file: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "mine", ("--data-dir", photographs)
    # 18 images: the last batch is of one, and at 32 pixels the last feature maps of a ResNet-18 are of one pixel.
    few = ("--epochs", 3, "--batch", 17, "--lr", 0.005, "--loaders", 0, "--held-out", 3)
    trained = train(*RESNET18, *data, *few, "--init", file, "--out", out)
    assert trained.exit_code == 0, trained.output
    assert "fc.weight and fc.bias are of another number of classes and were not taken" in trained.output
    assert "The head of 3 classes starts from random weights; all other tensors were taken." in trained.output

    config, model = load_model(out)
    assert (config.architecture, config.classes, config.input_shape) == ("torchvision:resnet18", CLASSES, (3, 32, 32))
    assert (config.mean, config.std) == (dataset_info("folder").mean, dataset_info("folder").std)
    assert config.recipe["init"].startswith("sha256:")
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "mine.run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]

    few = ("--n", 100, "--engine", "torch", "--no-compile", "--workers", 1)
    macer("certify", out, "--dataset", "folder", *data, *few, "--out", tmp_path / "mine.tsv")
    rows = [line for line in (tmp_path / "mine.tsv").read_text().splitlines() if not line.startswith("#")]
    assert len(rows) == 1 + 6
    assert "wrote" in macer("export", out, "--out", tmp_path / "mine.onnx").output
    quantised = macer("quantize", out, "--dataset", "folder", *data, "--held-out", 6)
    assert "wrote the int8 file" in quantised.output


def test_all_but_the_head_is_taken_if_the_classes_are_others(file: Path, weights: State) -> None:
    start = initial(file)
    taken = network_of(start)
    assert taken["fc.weight"].shape == (3, 512)
    assert all(torch.equal(value, weights[name]) for name, value in taken.items() if not name.startswith("fc."))
    assert torch.equal(taken["fc.weight"], network_of(initial(file))["fc.weight"]), "drawn by the seed"


def test_the_head_is_taken_if_the_classes_are_as_many(file: Path, weights: State) -> None:
    start = initial(file, classes=10)
    assert all(torch.equal(value, weights[name]) for name, value in network_of(start).items())
    assert start.note is not None
    assert "its 10 outputs are taken to be a, b, c, d, e, f and 4 more, in this order" in start.note


@pytest.mark.parametrize("layout", ["safetensors", "data-parallel", "nested", "legacy", "half"])
def test_layouts_of_files(tmp_path: Path, weights: State, layout: str) -> None:
    path = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pt")
    match layout:
        case "safetensors":
            save_file(weights, path)
        case "data-parallel":
            torch.save(nn.ModuleDict({"module": _resnet18(weights)}).state_dict(), path)
        case "nested":
            torch.save({"epoch": 3, "state_dict": weights, "best": 0.5}, path)
        case "legacy":
            torch.save(weights, path, _use_new_zipfile_serialization=False)
        case "half":
            torch.save({n: v.half() if v.is_floating_point() else v for n, v in weights.items()}, path)
    taken = network_of(initial(path))
    tolerance = 1e-3 if layout == "half" else 0.0
    for name in taken.keys() - {"fc.weight", "fc.bias"}:
        torch.testing.assert_close(taken[name], weights[name], rtol=tolerance, atol=tolerance)


def _resnet18(weights: State) -> nn.Module:
    network = resnet18(num_classes=10)
    network.load_state_dict(weights)
    return network


def test_published_names_of_densenet(tmp_path: Path) -> None:
    """torchvision's files of DenseNet name its layers as an older version did."""
    torch.manual_seed(1)
    now = densenet121(num_classes=5).state_dict()
    older = {n.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for n, v in now.items()}
    assert older.keys() != now.keys()
    torch.save(older, tmp_path / "densenet.pth")
    taken = network_of(initial(tmp_path / "densenet.pth", 3, "torchvision:densenet121"))
    assert all(torch.equal(value, now[name]) for name, value in taken.items() if not name.startswith("classifier."))


def _without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name not in names}


MISFITS: dict[str, tuple[Callable[[State], State], str]] = {
    "missing": (_without("layer1.0.conv1.weight", "bn1.bias"), "missing are bn1.bias, layer1.0.conv1.weight"),
    "no head": (_without("fc.weight", "fc.bias"), "missing are fc.weight, fc.bias"),
    "unexpected": (lambda state: {**state, "extra": torch.zeros(2)}, "unknown are extra"),
    "shape": (lambda state: {**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "of another shape are conv1.weight"),
    "bias": (lambda state: {**state, "fc.bias": torch.zeros(3)}, "of another shape are fc.weight"),
    "features": (lambda state: {**state, "fc.weight": torch.zeros(10, 256)}, "of another shape are fc.weight"),
    "other network": (lambda state: dict(squeezenet1_1(num_classes=3).state_dict()), "more. Name the architecture"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_any_other_mismatch_is_refused_by_name(tmp_path: Path, weights: State, misfit: str) -> None:
    change, named = MISFITS[misfit]
    torch.save(change(weights), tmp_path / "weights.pth")
    with pytest.raises(ParameterError) as refused:
        initial(tmp_path / "weights.pth")
    assert named in str(refused.value)
    assert "does not fit torchvision:resnet18" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("bn1.running_var", -torch.ones(64), CheckpointError, "bn1.running_var has negative values"),
        ("bn1.bias", torch.zeros(64, dtype=torch.int64), ParameterError, "another type of numbers are bn1.bias"),
        ("bn1.bias", torch.zeros(64, dtype=torch.complex64), CheckpointError, "torch.ComplexFloatStorage"),
        ("bn1.bias", torch.full((64,), 1e300, dtype=torch.float64), CheckpointError, "not finite in float32"),
        ("fc.weight", torch.zeros(2**40, 0), ParameterError, "of another shape are fc.weight"),
        ("fc.weight", torch.tensor(1.0), ParameterError, "of another shape are fc.weight"),
    ],
)
def test_weights_that_are_no_weights_are_refused(
    tmp_path: Path, weights: State, name: str, value: Tensor, error: type[Exception], words: str
) -> None:
    torch.save({**weights, name: value}, tmp_path / "weights.pth")
    with pytest.raises(error, match=words):
        initial(tmp_path / "weights.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, weights: State, value: float) -> None:
    torch.save({**weights, "bn1.bias": torch.full((64,), value)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"bn1\.bias has values that are not finite"):
        initial(tmp_path / "weights.pth")


class _Executes:
    """Unpickled without restrictions, this creates the file `executed` in the working directory."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_that_would_execute_code_is_refused_and_nothing_executed(
    train: Train, photographs: Path, tmp_path: Path, weights: State, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile, path = {**weights, "fc.bias": _Executes()}, tmp_path / "weights.pth"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"fc.bias": _Executes()}, protocol=2))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=form == "zip")
    refused = train(*RESNET18, "--data-dir", photographs, "--init", path, "--out", tmp_path / "out")
    assert refused.exit_code == 3
    assert (
        "weights.pth is refused, and nothing in it was executed: loading it would call posix.system" in refused.output
    )
    assert "weights_only" not in refused.output, "no advice to load it all the same"
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "a.pth is damaged, or not written by torch.save"),
        ("a.pt", b"PK\x03\x04 and so on", "a.pt is damaged"),
        ("a.safetensors", b"hello", "a.safetensors is damaged, or no safetensors file"),
        ("a.onnx", b"", "the name must end in .pth, .pt, .tar, .safetensors"),
        ("absent.pth", None, "absent.pth cannot be read: No such file"),
    ],
)
def test_files_that_hold_no_weights(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        initial(tmp_path / name)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, "holds more than named tensors: epoch, lr"),
        ([1, 2], "holds no state dict, but list"),
        ({}, "holds no state dict"),
        ({"a": torch.zeros(3).to_sparse()}, "loading it would call torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.zeros(3, device="meta")}, "loading it would call torch._utils._rebuild_meta_tensor"),
    ],
)
def test_files_of_other_things(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as refused:
        initial(tmp_path / "weights.pth")
    assert message in str(refused.value)


def test_a_compressed_file_is_refused_before_it_fills_the_memory(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.namelist():
            packed.writestr(entry, whole.read(entry))
    with pytest.raises(CheckpointError, match=r"bomb\.pth is refused, .* in it is compressed"):
        initial(tmp_path / "bomb.pth")


def test_another_file_does_not_continue_a_run(
    train: Train, photographs: Path, file: Path, weights: State, tmp_path: Path
) -> None:
    command = (*RESNET18, "--data-dir", photographs, "--epochs", 1, "--lr", 0.01, "--loaders", 0)
    command = (*command, "--init", file, "--out", tmp_path / "out")
    first = train(*command)
    assert first.exit_code == 0, first.output
    assert train(*command).stdout == first.stdout, "the same file: the run is complete"
    torch.save({**weights, "bn1.bias": weights["bn1.bias"] + 1.0}, file)
    refused = train(*command)
    assert refused.exit_code == 6
    assert "init was 'sha256:" in refused.output
    assert "--restart" in refused.output


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "swin_t"])
def test_the_head_is_the_last_layer(name: str) -> None:
    from torchvision.models import get_model

    with torch.device("meta"):
        first, second = (get_model(name, weights=None, num_classes=classes).state_dict() for classes in (5, 6))
        network = get_model(name, weights=None, num_classes=5)
    assert head_tensors(network) == [n for n, v in first.items() if v.shape != second[n].shape]
