"""Any torch module certifies at once, and is saved as what its certificates name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brightness import SECRET
from torch import Tensor, nn

from macer_serve.checkpoint import load_checkpoint, load_config, save_checkpoint
from macer_serve.errors import EngineError, ParameterError
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions

OPTIONS = VoterOptions(engine="torch", device="cpu", precision="fp32", batch=32, workers=1, compile=False)
PLAN = Plan(n0=20, n=100, alpha=0.05)
CLASSES = ("a", "b", "c")
IMAGE = np.random.default_rng(1).integers(0, 256, (4, 4, 3)).astype(np.uint8)


class Own(nn.Module):
    """A network with a constant that no state dict holds."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.scale = nn.Conv2d(3, 4, 3), nn.Linear(16, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.scale * x).relu().flatten(1))  # type: ignore[no-any-return]


class Unexportable(Own):
    """Its structure depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) < 1e9 else -super().forward(x)


def certifying(module: nn.Module, **changes: Any) -> SmoothedClassifier:
    facts = {"sigma": 0.25, "classes": CLASSES, "input_shape": (3, 4, 4), "secret": SECRET, "options": OPTIONS}
    return SmoothedClassifier.from_module(module, **{**facts, **changes})


def test_a_module_certifies_and_is_saved_as_what_certificates_name(tmp_path: Path) -> None:
    module = Own()
    g = certifying(module, name="own")
    certificate = g.certify(IMAGE, PLAN)
    assert sum(certificate.votes) == 100
    assert certificate.model == {"name": "own", "digest": g.config.digest}
    assert g.config.resize == 4
    saved = save_checkpoint(module, g.config, tmp_path / "own")
    assert saved == g.config
    assert list(saved.files) == ["model.onnx"]
    served = SmoothedClassifier.load(
        tmp_path / "own", secret=SECRET, options=dataclasses.replace(OPTIONS, engine="onnx")
    )
    again = served.certify(IMAGE, PLAN)
    assert (again.model, again.votes) == (certificate.model, certificate.votes)
    assert again.engine.startswith("onnx-")
    with pytest.raises(EngineError, match="the torch engine cannot run it"):
        SmoothedClassifier.load(tmp_path / "own", options=OPTIONS)
    assert module.training  # it is the caller's


def test_the_digest_is_that_of_weights_and_structure() -> None:
    same = {certifying(module).config.digest for module in (Own(), Own().eval())}
    assert len(same) == 1
    changed = Own()
    with torch.no_grad():
        changed.fc.bias[0] += 1e-3
    # The second holds the same weights under the same names.
    assert len({*same, *(certifying(module).config.digest for module in (changed, Own(scale=2.0)))}) == 3


def test_a_module_without_a_graph_has_a_digest_of_its_own_object(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    g, h = certifying(Unexportable()), certifying(Unexportable())
    assert sum(g.certify(IMAGE, PLAN).votes) == 100
    assert g.config.digest != h.config.digest
    assert "nobody can repeat them" in caplog.text
    with pytest.raises(EngineError, match="torch cannot export this network"):
        save_checkpoint(Unexportable(), g.config, tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_what_no_checkpoint_can_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"takes a torch\.nn\.Module, not function"):
        certifying(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=r"returns \[3, 3\]; \[k, 4\] is needed"):
        certifying(Own(), classes=4)
    config = dataclasses.replace(certifying(Own(), classes=3).config, mean=(0.5,) * 3)
    with pytest.raises(ParameterError, match="normalisation of a module is part of it"):
        save_checkpoint(Own(), config, tmp_path / "own")


def test_a_module_of_probabilities_is_refused_to_the_soft_bound() -> None:
    g = certifying(nn.Sequential(Own(), nn.Softmax(1)))
    assert g.config.outputs == "probabilities"
    with pytest.raises(ParameterError, match="soft bound needs logits"):
        g.certify(IMAGE, Plan(n=10, bound="soft"))
    assert certifying(Own()).certify(IMAGE, Plan(n0=5, n=10, bound="soft", alpha=0.05)).n == 10


def test_a_saved_module_is_quantised_like_any_checkpoint(tmp_path: Path) -> None:
    from macer_serve.checkpoint.quantize import quantize_checkpoint

    save_checkpoint(Own(), certifying(Own()).config, tmp_path / "own")
    pixels = np.random.default_rng(0).random((32, 3, 4, 4), dtype=np.float32)
    config = quantize_checkpoint(tmp_path / "own", pixels, pixels, source={"dataset": "random"})
    assert sorted(config.files) == ["model.int8.onnx", "model.onnx"]
    assert config.quantization["disagreement"] < 0.2
    _, classifier = load_checkpoint(tmp_path / "own")
    assert classifier.int8 is not None


def test_the_documented_session_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    code = re.search(r"```python\n(.*?)```", (root / "docs" / "own-model.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes((root / "tests" / "images" / "0000-cat.png").read_bytes())
    torch.manual_seed(0)
    names: dict[str, Any] = {"net": nn.Sequential(nn.Flatten(), nn.Linear(192, 2))}
    exec(code[1], names)
    assert load_config("runs/module").digest == names["certificate"].model["digest"]
