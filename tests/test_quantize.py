"""`macer quantize`: what it writes, that it is true int8 with an fp32 head, and that its certificates are sound."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from cases import classifier_of
from click.testing import CliRunner, Result
from scipy.special import ndtri
from scipy.stats import binom
from torch import Tensor, nn

from macer_serve.architectures import base_classifier
from macer_serve.base_classifier import BaseClassifier
from macer_serve.checkpoint import INT8, WEIGHTS, CheckpointConfig, load_checkpoint, load_config, save_checkpoint
from macer_serve.checkpoint.quantize import calibration_size, disagreement, quantize_graph
from macer_serve.cli import main
from macer_serve.errors import CheckpointError, EngineError
from macer_serve.issuing import EvaluationSeed
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.binomial import clopper_pearson_lower
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions, open_voter

SIGMA = 0.25


def macer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in MNIST's files: 600 training and 100 test images of noise."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in (("train", 600), ("t10k", 100)):
        images = generator.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        head = b"".join(v.to_bytes(4, "big") for v in (0x803, size, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = (np.arange(size) % 10).astype(np.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            b"".join(v.to_bytes(4, "big") for v in (0x801, size)) + labels.tobytes()
        )
    return folder


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    model = base_classifier("lenet", classes=10, input_shape=(1, 28, 28), mean=(0.0,), std=(1.0,)).eval()
    config = CheckpointConfig(
        name="digits", architecture="lenet", classes=tuple(str(i) for i in range(10)), input_shape=(1, 28, 28),
        mean=(0.0,), std=(1.0,), sigma=SIGMA, resize=28, files={WEIGHTS: "sha256:" + 64 * "0"}, dataset="mnist",
    )  # fmt: skip
    save_checkpoint(model, config, folder)
    return folder


def test_the_command_adds_a_file_and_what_it_is_worth(mnist: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "digits")
    before = load_config(folder)
    result = macer("quantize", folder, "--data-dir", mnist, "--held-out", 100)
    assert result.exit_code == 0, result.output
    after = load_config(folder)
    assert set(after.files) == {WEIGHTS, INT8}
    assert after.files[WEIGHTS] == before.files[WEIGHTS]
    assert after.digest != before.digest  # certificates say which
    record = after.quantization
    assert (record["dataset"], record["calibration_images"], record["held_out_images"]) == ("mnist", 592, 100)
    assert 0 <= record["disagreement"] < 0.2
    assert f"other classes on {record['disagreement']:.2%} of 100" in result.stdout
    again = macer("quantize", folder, "--data-dir", mnist, "--held-out", 100)
    assert again.exit_code == 0, again.output
    assert load_config(folder) == after  # the same bytes
    (folder / INT8).write_bytes((folder / INT8).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not the file this checkpoint was saved with"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "--data-dir", "."], 3, "not a checkpoint"),
        (["bundled:cifar10", "--data-dir", "."], 4, "cifar-10-batches-py"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: list[str], code: int, words: str) -> None:
    result = macer("quantize", *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_another_set_of_classes_is_refused(mnist: Path) -> None:
    result = macer("quantize", "bundled:cifar10", "--dataset", "mnist", "--data-dir", mnist)
    assert result.exit_code == 2, result.output
    assert load_config("bundled:cifar10").quantization["dataset"] == "cifar10"


def test_convolutions_are_int8_and_the_last_layer_is_fp32() -> None:
    _, bundled = load_checkpoint("bundled:cifar10")
    graph = onnx.load_from_string(bundled.int8_graph()).graph
    produced = {output: node for node in graph.node for output in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    quantised = [produced.get(node.input[1]) for node in layers]
    assert [node is not None and node.op_type == "DequantizeLinear" for node in quantised] == [True] * 21 + [False]
    last = layers[-1]
    assert last.output[0] == "logits"
    weights = next(w for w in graph.initializer if w.name == last.input[1])
    assert weights.data_type == onnx.TensorProto.FLOAT


def test_the_disagreement_is_that_of_the_two_graphs() -> None:
    graph = classifier_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2)).graph()
    flipped = onnx.load_from_string(graph)
    layer = next(node for node in flipped.graph.node if node.op_type == "Gemm")
    next(a for a in layer.attribute if a.name == "alpha").f = -1.0
    pixels = np.random.default_rng(0).random((50, 3, 2, 2), dtype=np.float32)
    assert disagreement(graph, graph, pixels) == 0.0
    assert disagreement(graph, flipped.SerializeToString(), pixels) > 0.0


def test_a_network_of_one_layer_has_nothing_to_quantise() -> None:
    graph = classifier_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2)).graph()
    with pytest.raises(EngineError, match="nothing to quantise"):
        quantize_graph(graph, np.zeros((16, 3, 2, 2), np.float32))


def test_large_inputs_are_calibrated_on_fewer() -> None:
    assert calibration_size((1, 28, 28)) == 1024
    assert calibration_size((3, 224, 224)) == 32


# --- soundness: a quantised network whose truth is found by enumeration -----------------------------------------------


class OnePixel(nn.Module):
    """Two classes by the value of one pixel, through a convolution and two linear layers, so that int8 applies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.fc = nn.Conv2d(1, 4, 1), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = self.conv(x[:, :, :1, :1]).flatten(1)
        return self.fc(torch.relu(self.hidden(torch.relu(one))))  # type: ignore[no-any-return]


def one_pixel() -> tuple[BaseClassifier, int]:
    """The quantised classifier, and the least lattice value of the pixel that gives class 1, by enumeration.

    The weights are drawn until the class rises once over all values that noise reaches: then f = [z >= t].
    """
    values = np.arange(-900, 1156)
    pixels = np.zeros((len(values), 1, 4, 4), np.float32)
    pixels[:, 0, 0, 0] = values.astype(np.float32) * np.float32(1 / 255)
    for seed in range(1000):
        torch.manual_seed(seed)
        module = OnePixel().eval()
        classifier = classifier_of(module, (1, 4, 4))
        with torch.inference_mode():
            plain = module(torch.from_numpy(pixels)).argmax(1).numpy()
        if (np.diff(plain) == 1).sum() != 1 or (np.diff(plain) != 0).sum() != 1 or not 80 < plain.argmax() - 900 < 180:
            continue
        int8 = quantize_graph(classifier.graph(), pixels)
        session = onnxruntime.InferenceSession(int8, providers=["CPUExecutionProvider"])
        classes = session.run(["logits"], {"pixels": pixels})[0].argmax(1)
        if (np.diff(classes) == 1).sum() == 1 and (np.diff(classes) != 0).sum() == 1:
            return dataclasses.replace(classifier, int8=int8), int(values[classes.argmax()])
    raise AssertionError("no such network was found")


@pytest.fixture(scope="module")
def threshold() -> tuple[BaseClassifier, int]:
    return one_pixel()


def certify_all(g: SmoothedClassifier, t: int, plan: Plan, radii: list[int], runs: int) -> int:
    """Of `runs` certificates of distinct images, at distances near `radii` lattice steps: how many are false."""
    generator = np.random.default_rng(5)
    false = certified = 0
    for i in range(runs):
        side = 1 if i % 2 else -1
        pixel = t - 1 + (side + 1) // 2 + side * radii[i // 2 % len(radii)]
        image: npt.NDArray[np.uint8] = generator.integers(0, 256, (4, 4), dtype=np.uint8)
        image[0, 0] = pixel
        truth = abs(pixel - (t - 0.5)) / 255
        c = g.certify(image, plan)
        certified += not c.abstained
        false += not c.abstained and (c.class_id != int(pixel >= t) or c.radius > truth)
    assert certified > runs / 5
    return false


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize("broken", [False, True])
def test_int8_certificates_are_sound(
    threshold: tuple[BaseClassifier, int], engine: str, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boundary is z = t - 1/2, by the very engine's classes of each value; false alarms 1e-6."""
    classifier, t = threshold
    alpha, runs = 0.05, 600
    config = CheckpointConfig(
        name="one pixel", architecture="test", classes=("below", "above"), input_shape=(1, 4, 4), mean=(0.0,),
        std=(1.0,), sigma=SIGMA, resize=4, files={WEIGHTS: "sha256:" + 64 * "0"},
    )  # fmt: skip
    plan = Plan(n0=50, n=200, alpha=alpha)
    proved = [SIGMA * ndtri(clopper_pearson_lower(k, plan.n, alpha)) for k in (130, 150)]
    radii = [int(np.floor(255 * radius - 0.5)) for radius in proved]
    if broken:
        original = clopper_pearson_lower
        for place in ("confidence", "binomial"):
            monkeypatch.setattr(
                f"macer_serve.smoothing.{place}.clopper_pearson_lower", lambda k, n, a: original(k, n, min(0.49, 5 * a))
            )
    options: Any = VoterOptions(engine=engine, device="cpu", precision="int8", batch=250, workers=1)
    with open_voter(classifier, sigma=SIGMA, options=options) as voter:
        assert voter.engine.startswith(f"{engine}-cpu-int8-")
        g = SmoothedClassifier(config, voter=voter, issuer=EvaluationSeed(bytes(range(32))))
        false = certify_all(g, t, plan, radii, runs)
    assert (float(binom.sf(false - 1, runs, alpha)) < 1e-6) == broken, false


def test_the_record_is_json(tmp_path: Path) -> None:
    record = load_config("bundled:cifar10").quantization
    assert json.loads(json.dumps(record)) == record
    assert record["disagreement"] <= 0.02
