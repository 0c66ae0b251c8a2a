"""Each file that users bring is imported by one command, and votes as the original does on the same noisy copies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from importing.foreign_files import CASES, SIGMA, cohen, linear, macer, picture, torchvision_weights
from PIL import Image

from macer_serve.base_classifier import probe_pixels
from macer_serve.checkpoint import load_checkpoint, load_config
from macer_serve.checkpoint.quantize import quantize_checkpoint
from macer_serve.cli.exit_codes import EXIT_CODES
from macer_serve.errors import CheckpointError, ParameterError
from macer_serve.smoothing.noise import FRACTION_BITS, noise_for
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import Task, VoterOptions, open_voter

COPIES, SEED = 96, bytes(range(16))


@pytest.mark.parametrize("name", CASES)
def test_an_imported_network_votes_as_the_original(name: str, tmp_path: Path) -> None:
    """All but ties of the last bit: engines add in another order than torch, by which a logit moves by less than 1e-4
    of the largest. A copy whose two highest logits are nearer than that may count for either class.
    """
    case, out = CASES[name](tmp_path), tmp_path / "checkpoint"
    done = macer("import", case.file, "--sigma", SIGMA, "--out", out, *case.options)
    assert done.exit_code == 0, done.output
    config, classifier = load_checkpoint(out)
    assert done.stdout == f"wrote {out}  {config.digest}\n"
    named = name in ("cohen", "salman", "macer", "buffers", "safetensors", "lenet", "torchvision")
    assert sorted(config.files) == ["model.safetensors" if named else "model.onnx"]
    noise = noise_for("exact", SIGMA)
    pixels = picture(case.shape)
    x = pixels.astype(np.int32) << FRACTION_BITS
    copies = noise.sample(x, SEED, "estimation", 0, COPIES).transpose(0, 3, 1, 2).astype(np.float32)
    logits = case.logits(np.ascontiguousarray(copies * np.float32(noise.scale)))
    expected = np.bincount(logits.argmax(1), minlength=logits.shape[1])
    assert (expected > 0).sum() >= 2  # the comparison says something
    top = np.sort(logits, axis=1)
    ties = int((top[:, -1] - top[:, -2] < 1e-4 * np.abs(logits).max()).sum())
    assert ties <= 1
    options = VoterOptions(device="cpu", precision="fp32", batch=32, workers=1, compile=False)
    with open_voter(classifier, sigma=config.sigma, options=options) as voter:
        assert voter.engine.startswith("torch" if named else "onnx")
        (votes,) = voter.submit([Task(x, SEED, Draw("estimation", 0, COPIES))]).result()
    assert np.abs(votes - expected).sum() <= 2 * ties

    image = tmp_path / "picture.png"
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(image)
    predicted = macer(
        "predict", image, "--checkpoint", out, "--n", 64, "--n0", 16, "--alpha", 0.05, "--precision", "fp32",
        "--no-compile", "--batch", 32, "--cores", 1, "--json",
    )  # fmt: skip
    assert predicted.exit_code == 0, predicted.output
    assert json.loads(predicted.stdout)["certificate"]["model"] == {"name": "checkpoint", "digest": config.digest}


def test_what_macer_export_wrote_lacks_nothing(tmp_path: Path) -> None:
    exported, out = tmp_path / "cifar10.onnx", tmp_path / "again"
    assert macer("export", "bundled:cifar10", "--out", exported).exit_code == 0
    done = macer("import", exported, "--out", out)
    assert done.exit_code == 0, done.output
    config, bundled = load_config(out), load_config("bundled:cifar10")
    for field in ("classes", "input_shape", "sigma", "resize", "name"):
        assert getattr(config, field) == getattr(bundled, field)
    assert config.source["format"] == "onnx"
    assert config.source["file"] == "cifar10.onnx"


@pytest.mark.parametrize(
    ("left_out", "words", "flag"),
    [
        ("--sigma", "the sigma of the noise", "--sigma S"),
        ("--classes", "the names of its classes", "--classes FILE"),
        ("--input-shape", "the shape of its input", "--input-shape C,H,W"),
        ("--mean", "how pixel values are to be normalised", "--mean and --std, or --range"),
    ],
)
def test_what_is_missing_is_named_with_its_option(left_out: str, words: str, flag: str, tmp_path: Path) -> None:
    case = torchvision_weights(tmp_path)
    given = ("--sigma", str(SIGMA), *case.options)
    options = dict(zip(given[::2], given[1::2], strict=True))
    del options[left_out]
    if left_out == "--mean":
        del options["--std"]
    done = macer("import", case.file, "--out", tmp_path / "out", *[part for pair in options.items() for part in pair])
    assert done.exit_code == EXIT_CODES[ParameterError]
    assert words in done.stderr
    assert f"Give {flag}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    """A published file whose normalisation layer has no numbers: Cohen's and Salman's differ, nobody can tell."""
    done = macer("import", cohen(tmp_path).file, "--out", tmp_path / "out")
    assert done.exit_code == EXIT_CODES[ParameterError]
    for flag in ("--sigma", "--classes", "--mean"):
        assert flag in done.stderr
    assert "--input-shape" not in done.stderr  # their architectures have one


def test_class_names_come_from_a_file(tmp_path: Path) -> None:
    case, names = cohen(tmp_path), tmp_path / "names.txt"
    names.write_text("\n".join(f"één {i}" for i in range(10)) + "\n\n", encoding="utf-8")
    options = ["--sigma", SIGMA, "--mean", 0.5, "--std", 0.25, "--out", tmp_path / "out"]
    assert macer("import", case.file, "--classes", names, *options).exit_code == 0
    config = load_config(tmp_path / "out")
    assert config.classes[3] == "één 3"
    assert (config.mean, config.std) == ((0.5,) * 3, (0.25,) * 3)
    for wrong, words in ((9, "10 outputs, and 9 classes"), (tmp_path / "nowhere", "No such file")):
        refused = macer("import", case.file, "--classes", wrong, *options)
        assert refused.exit_code == EXIT_CODES[ParameterError]
        assert words in refused.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--range", "1,0"], "range of values must ascend"),
        (["--range", "0"], "2 numbers are needed"),
        (["--std", "0"], "std must be positive"),
        (["--mean", "0.1,0.2"], "one value, or one for each of 3 channels"),
        (["--mean", "nan"], "finite"),
        (["--mean", "a"], "not a list of numbers"),
        (["--range", "0,1", "--input-shape", "3,16,16"], "inputs (3, 4, 4), not (3, 16, 16)"),
        (["--range", "0,1", "--arch", "torchvision:resnet18"], "holds no weights that can be read"),
        (["--range", "0,1", "--arch", "keras:vgg"], "cannot be imported as keras:vgg"),
        (["--range", "0,1", "--sigma", "9"], "sigma must lie in"),
        (["--range", "0,1", "--resize", "3"], "resize must be at least"),
    ],
)
def test_options_out_of_order_are_refused(options: list[str], words: str, tmp_path: Path) -> None:
    file = linear(tmp_path).file
    done = macer("import", file, "--sigma", SIGMA, "--classes", 5, "--out", tmp_path / "out", *options)
    assert done.exit_code in (EXIT_CODES[CheckpointError], EXIT_CODES[ParameterError])
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_network_of_torchvision_is_refused(tmp_path: Path) -> None:
    case = torchvision_weights(tmp_path)
    for arch, words in (("resnet19", "no classifier 'resnet19'"), ("vgg11", "it has no classifier.6.weight")):
        done = macer("import", case.file, "--arch", f"torchvision:{arch}", "--out", tmp_path / "out")
        assert done.exit_code != 0
        assert words in done.stderr
    wider = macer("import", case.file, "--arch", "torchvision:resnet34", "--out", tmp_path / "out")
    assert "is not a torchvision:resnet34: missing are layer1.2.conv1.weight" in wider.stderr
    other = macer("import", case.file, "--arch", "torchvision:regnet_x_400mf", "--out", tmp_path / "out")
    assert "is not a torchvision:regnet_x_400mf: missing are stem.0.weight" in other.stderr


def test_an_imported_graph_is_quantised_and_exported_like_any_checkpoint(tmp_path: Path) -> None:
    """All but the last layer becomes int8, whatever the file called its nodes."""
    case, out = CASES["denoiser"](tmp_path), tmp_path / "checkpoint"
    assert macer("import", case.file, "--sigma", SIGMA, "--out", out, *case.options).exit_code == 0
    exported = macer("export", out, "--out", tmp_path / "exported.onnx")
    assert exported.exit_code == 0, exported.output
    assert macer("import", tmp_path / "exported.onnx", "--out", tmp_path / "again").exit_code == 0
    pixels = probe_pixels(64, case.shape, SIGMA)
    config = quantize_checkpoint(out, pixels[:32], pixels[32:], source={"dataset": "random"})
    assert config.quantization["disagreement"] <= 0.25
    int8 = onnx.load(out / "model.int8.onnx").graph
    rounded = {name for node in int8.node if node.op_type == "DequantizeLinear" for name in node.output}
    weights = [(n.op_type, n.input[1] in rounded) for n in int8.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert weights == [("Conv", True), ("Conv", True), ("Gemm", False)]
