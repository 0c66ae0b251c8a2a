"""An exported file is the base classifier: same logits, self-describing, and never left behind where it is not."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from digit_checkpoints import lenet

from macer_serve.checkpoint import load_config, load_model, save_checkpoint
from macer_serve.checkpoint.export import export_onnx
from macer_serve.checkpoint.same_logits import require_same_logits
from macer_serve.cli import main
from macer_serve.cli.exit_codes import exit_code
from macer_serve.errors import CheckpointError, EngineError, EngineMismatchError, OutputError


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeNet's checkpoint; its classes have names that JSON and ONNX must carry unharmed."""
    model, settings = lenet()
    folder = tmp_path_factory.mktemp("checkpoints") / "digits"
    classes = ('"0"', "één, uno", "二", *"3456789")
    save_checkpoint(model, dataclasses.replace(settings, classes=classes), folder)
    return folder


@pytest.fixture(scope="module")
def exported(digits: Path) -> Path:
    """Its ONNX file, to be read only."""
    out = digits.parent / "exported" / "digits.onnx"
    export_onnx(digits, out)
    return out


def session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def run(file: Path, pixels: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session(file).run(["logits"], {"pixels": pixels.numpy()})[0])


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_lenet_gives_the_logits_of_the_checkpoint(digits: Path, exported: Path, batch: int) -> None:
    _, model = load_model(digits)
    pixels = torch.rand(batch, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(run(exported, pixels), model(pixels), rtol=0, atol=1e-5)


def test_the_bundled_residual_network_classifies_a_photograph_from_the_file(tmp_path: Path) -> None:
    """Pixels in [0, 1] go in as they are: the normalisation is in the graph."""
    from PIL import Image

    out = tmp_path / "new folder" / "cifar10.onnx"
    result = CliRunner().invoke(main, ["export", "bundled:cifar10", "--out", str(out)])
    assert result.exit_code == 0, result.output
    ship = np.asarray(Image.open(Path(__file__).parent / "images" / "0001-ship.png"), np.float32) / 255
    pixels = torch.from_numpy(ship.transpose(2, 0, 1)).repeat(3, 1, 1, 1)
    config, model = load_model("bundled:cifar10")
    logits = run(out, pixels)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(pixels), rtol=0, atol=1e-4)
    assert [config.classes[i] for i in logits.argmax(1)] == ["ship"] * 3


def test_the_file_says_what_it_means(digits: Path, exported: Path) -> None:
    config = load_config(digits)
    (pixels,), (logits,) = session(exported).get_inputs(), session(exported).get_outputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(float)", ["batch", 1, 28, 28])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    told = session(exported).get_modelmeta().custom_metadata_map
    assert (told.pop("name"), told.pop("checkpoint")) == (config.name, config.digest)
    assert {key: json.loads(value) for key, value in told.items()} == {
        "macer_format": 1,
        "sigma": config.sigma,
        "classes": list(config.classes),
        "input_shape": [1, 28, 28],
        "resize": 28,
    }


def test_exporting_again_replaces_the_file_by_the_same_bytes(digits: Path, exported: Path, tmp_path: Path) -> None:
    """In another process; nothing of the machine is in it. One line is said, and it names the file's digest."""
    out = tmp_path / "model.onnx"
    out.write_text("of another day")
    command = [sys.executable, "-c", "from macer_serve.cli import main; main()", "export", str(digits)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = out.read_bytes()
    assert data == exported.read_bytes()
    assert done.stdout == f"wrote {out}  sha256:{hashlib.sha256(data).hexdigest()}\n"
    assert done.stderr == ""
    for path in (b".py", str(Path.cwd()).encode(), str(digits).encode()):
        assert path not in data
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert out.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1", "fc"])
def test_a_perturbed_weight_is_noticed(digits: Path, exported: Path, layer: str) -> None:
    config, model = load_model(digits)
    require_same_logits(exported.read_bytes(), model, config.input_shape, config.sigma)
    weight = model.get_parameter(f"1.{layer}.weight")
    with torch.no_grad():
        weight.view(-1)[0] += weight.std()
    with pytest.raises(EngineMismatchError, match="do not compute the same logits"):
        require_same_logits(exported.read_bytes(), model, config.input_shape, config.sigma)


@pytest.mark.parametrize(("altered", "found"), [(0.0, False), (0.1, True)])
def test_a_masked_class_hides_no_other(altered: float, found: bool, digits: Path, exported: Path) -> None:
    """A logit of -1e9 allowed all others to differ by 20,000."""
    config, model = load_model(digits)
    proto = onnx.load(exported)
    (bias,) = [tensor for tensor in proto.graph.initializer if tensor.name.endswith("fc.bias")]
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] = -1e9
    with torch.no_grad():
        model.get_parameter("1.fc.bias")[:] = torch.from_numpy(values)
    values[1] += altered
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    with pytest.raises(EngineMismatchError) if found else contextlib.nullcontext():
        require_same_logits(proto.SerializeToString(), model, config.input_shape, config.sigma)


def test_another_normalisation_or_a_nan_is_noticed(digits: Path, exported: Path) -> None:
    config, model = load_model(digits)
    mean = model.get_buffer("0.mean")
    mean += 1 / 255
    with pytest.raises(EngineMismatchError):
        require_same_logits(exported.read_bytes(), model, config.input_shape, config.sigma)
    mean.fill_(torch.nan)
    with pytest.raises(EngineMismatchError):
        require_same_logits(exported.read_bytes(), model, config.input_shape, config.sigma)


@pytest.fixture
def exporter(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Makes torch's exporter return the file above, spoilt by the function given."""

    def spoil(change: Callable[[Any], None]) -> None:
        proto = onnx.load(exported)
        change(proto)
        monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: type("Program", (), {"model_proto": proto}))

    return spoil


def test_a_file_that_differs_is_not_left(
    digits: Path, tmp_path: Path, exporter: Callable[[Callable[[Any], None]], None]
) -> None:
    def perturb(proto: Any) -> None:
        weight = next(t for t in proto.graph.initializer if t.name.endswith("conv1.weight"))
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0, 0, 0, 0] += values.std()
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    out = tmp_path / "model.onnx"
    exporter(lambda proto: None)
    export_onnx(digits, out)
    before = out.read_bytes()
    exporter(perturb)
    result = CliRunner().invoke(main, ["export", str(digits), "--out", str(out)])
    assert result.exit_code == exit_code(EngineMismatchError("x"))
    assert "do not compute the same logits" in result.stderr
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_an_invalid_graph_is_not_left(
    digits: Path, tmp_path: Path, exporter: Callable[[Callable[[Any], None]], None]
) -> None:
    def misname(proto: Any) -> None:
        proto.graph.node[0].input[0] = "nowhere"

    exporter(misname)
    with pytest.raises(EngineError, match="invalid graph"):
        export_onnx(digits, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def macer_export(checkpoint: object, out: Path) -> Result:
    return CliRunner().invoke(main, ["export", str(checkpoint), "--out", str(out)])


def test_places_that_cannot_be_written_and_missing_checkpoints_get_a_sentence(
    digits: Path, tmp_path: Path, exporter: Callable[[Callable[[Any], None]], None]
) -> None:
    exporter(lambda proto: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"model\.onnx cannot be written: "):
        export_onnx(digits, tmp_path / "file" / "model.onnx")
    result = macer_export("bundled:nowhere", tmp_path / "model.onnx")
    assert result.exit_code == exit_code(CheckpointError("x"))
    assert "is not a checkpoint" in result.stderr
