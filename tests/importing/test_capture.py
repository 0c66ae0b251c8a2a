"""What votes is what a module computed when it was captured, whatever it reads, and whatever becomes of it later."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brightness import SEEDS
from cases import classifier_of
from importing.user_modules import BEYOND_ONNX, CAPTURED, CLASSES, IMAGE, OUTSIDE, REFUSED, SHAPE, Flat, convolutional
from torch import nn

from macer_serve.checkpoint import load_checkpoint, load_config
from macer_serve.checkpoint.capture import captured
from macer_serve.errors import EngineError, ParameterError
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.noise import FRACTION_BITS, noise_for
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import Task, VoterOptions, open_voter
from macer_serve.voters.torch import _folded, split_head

SIGMA, SEED, COPIES = 0.25, bytes(range(16)), 256
OPTIONS = VoterOptions(engine="torch", device="cpu", precision="fp32", batch=32, workers=1, compile=False)
X = IMAGE.astype(np.int32) << FRACTION_BITS


def certifying(module: nn.Module, **changes: Any) -> SmoothedClassifier:
    facts = {"sigma": SIGMA, "classes": CLASSES, "input_shape": SHAPE, "issuer": SEEDS, "options": OPTIONS}
    return SmoothedClassifier.from_module(module, **{**facts, **changes})


def votes_of(voter: Any) -> list[int]:
    (votes,) = voter.submit([Task(X, SEED, Draw("estimation", 0, COPIES))]).result()
    return votes.tolist()  # type: ignore[no-any-return]


def plain_votes(module: nn.Module) -> list[int]:
    """The votes of the module in eval mode on the copies that a voter draws; no copy is a tie of the last bits."""
    noise = noise_for("exact", SIGMA)
    copies = noise.sample(X, SEED, "estimation", 0, COPIES).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        logits = module.eval()(torch.from_numpy(np.ascontiguousarray(copies * np.float32(noise.scale))))
    top = logits.sort(1).values
    assert float((top[:, -1] - top[:, -2]).min()) > 1e-4 * float(logits.abs().max())
    votes = logits.argmax(1).bincount(minlength=3).tolist()
    assert sum(count > 20 for count in votes) >= 2  # the comparison says something
    return votes  # type: ignore[no-any-return]


def described(module: nn.Module) -> dict[str, Any]:
    """All that a capture might change: modes, attributes, tables such as hooks, weights bit for bit, gradients."""
    layers = {name: dict(vars(layer)) for name, layer in module.named_modules()}
    tables = {(name, key): list(v.items()) for name, own in layers.items() for key, v in own.items() if type(v) is dict}
    return {
        "attributes": {name: {k: id(v) for k, v in own.items()} for name, own in layers.items()},
        "tables": {key: [(k, id(v)) for k, v in items] for key, items in tables.items()},
        "tensors": {k: v.detach().numpy().tobytes() for k, v in module.state_dict().items() if torch.is_tensor(v)},
        "gradients": {k: (v.requires_grad, v.grad is None) for k, v in module.named_parameters()},
        "dtypes": {k: v.dtype for k, v in module.named_parameters()},
    }


def trained_further(module: nn.Module) -> None:
    """Change all that the module computes with: its weights and buffers, what it holds and reads elsewhere."""
    tensors = [*module.parameters(), *module.buffers(), OUTSIDE.weight]
    for layer in module.modules():
        for held in [*getattr(layer, "held", []), *getattr(layer, "other", [])]:
            tensors += held.parameters()
        layer.scale = 3.0
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, tensors):
            tensor.neg_().add_(0.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_module_votes_as_it_did_and_is_left_alone(name: str, training: bool) -> None:
    module = CAPTURED[name]().train(training)
    outside = copy.deepcopy(OUTSIDE.state_dict())
    before = described(module)
    graph = captured(module, SHAPE, SIGMA)
    assert described(module) == before
    assert not graph.training
    with open_voter(classifier_of(graph, SHAPE), sigma=SIGMA, options=OPTIONS) as voter:
        expected = plain_votes(module)
        assert votes_of(voter) == expected
        trained_further(module)
        try:
            assert votes_of(voter) == expected
            assert plain_votes_or_none(module) != expected
        finally:
            OUTSIDE.load_state_dict(outside)


def plain_votes_or_none(module: nn.Module) -> list[int] | None:
    try:
        return plain_votes(module)
    except AssertionError:  # all for one class
        return None


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_of_its_input_is_refused_and_left_alone(name: str) -> None:
    make, words = REFUSED[name]
    module = make()
    before = described(module)
    with pytest.raises(ParameterError, match=words):
        certifying(module)
    assert described(module) == before


@pytest.mark.parametrize("name", BEYOND_ONNX)
def test_what_onnx_cannot_express_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(
        EngineError, match=r"(export this network|load this graph).*Or export it as an ONNX file by other"
    ):
        certifying(BEYOND_ONNX[name]())


@pytest.mark.parametrize("module", [nn.LazyLinear(3), nn.Linear(48, 3, device="meta")])
def test_a_module_without_values_is_refused(module: nn.Module) -> None:
    with pytest.raises(ParameterError, match="weight has no values yet: load its weights, or run it once"):
        captured(module, SHAPE, SIGMA)


def test_a_refusal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("decides by pixels", "decides by a large batch"):
        with pytest.raises(ParameterError):
            captured(REFUSED[name][0](), SHAPE, SIGMA)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a held network", "hooks", "len"])
def test_votes_digest_and_checkpoint_stay_those_of_the_capture(name: str, tmp_path: Path) -> None:
    """By torch, and by onnxruntime from the folder that is saved after the module was trained further."""
    module = CAPTURED[name]()
    g, expected = certifying(module), plain_votes(module)
    assert certifying(CAPTURED[name]()).config == g.config
    trained_further(module)
    assert certifying(module).config.digest != g.config.digest
    g.save_checkpoint(tmp_path / "saved")
    assert load_config(tmp_path / "saved") == g.config
    served = SmoothedClassifier.load(tmp_path / "saved", options=VoterOptions(device="cpu", batch=32, workers=1))
    assert votes_of(g.voter) == votes_of(served.voter) == expected
    with pytest.raises(ParameterError, match="loaded from a checkpoint: copy the checkpoint's folder"):
        served.save_checkpoint(tmp_path / "again")


def test_a_captured_network_is_folded_and_its_head_split_like_any_other() -> None:
    """Else bf16 would round the logits, and batch normalisation would cost time."""
    graph = captured(convolutional(), SHAPE, SIGMA)
    folded = _folded(graph)
    kinds = [type(layer) for layer in folded.modules()]
    assert kinds.count(nn.Conv2d) == 2
    # The first is folded. The second has no weights, which folding does not take.
    assert kinds.count(nn.BatchNorm2d) == 0
    assert split_head(folded, torch.rand(8, *SHAPE)) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["dropout and batch norm", "positions", "attention", "len"])
def test_a_module_on_a_gpu_is_captured_on_the_cpu(name: str) -> None:
    module = CAPTURED[name]().to("cuda")
    graph = captured(module, SHAPE, SIGMA)
    assert {tensor.device.type for tensor in (*graph.parameters(), *graph.buffers())} <= {"cpu"}
    assert {tensor.device.type for tensor in module.parameters()} == {"cuda"}
    again = captured(copy.deepcopy(module).cpu(), SHAPE, SIGMA)
    pixels = torch.rand(5, *SHAPE)
    torch.testing.assert_close(graph(pixels), again(pixels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(graph.to("cuda")(pixels.to("cuda")).cpu(), again(pixels), rtol=1e-3, atol=1e-3)


def test_a_graph_for_the_voter_of_another_shape_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"cannot be run on float32 inputs \[3, 3, 5, 5\]"):
        captured(Flat(), (3, 5, 5), SIGMA)


def test_a_captured_module_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    certifying(CAPTURED["dropout and batch norm"]()).save_checkpoint(tmp_path / "saved")
    config, classifier = load_checkpoint(tmp_path / "saved")
    assert config.architecture == "onnx"
    assert list(config.files) == ["model.onnx"]
    assert classifier.load_module is None
