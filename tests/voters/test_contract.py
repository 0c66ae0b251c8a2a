"""Whatever a network ends in, the votes are those of the plain module on the same noisy copies, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from cases import classifier_of, voter_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from macer_serve.base_classifier import BaseClassifier
from macer_serve.errors import EngineError
from macer_serve.smoothing.noise import FRACTION_BITS, noise_for
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import Task, VoterOptions, open_voter
from macer_serve.voters.torch import split_head

SHAPE, SIGMA, SEED, COPIES = (3, 8, 8), 0.25, bytes(range(16)), 300


def image() -> npt.NDArray[np.int32]:
    generator = np.random.default_rng(1)
    return generator.integers(0, 256, (8, 8, 3)).astype(np.int32) << FRACTION_BITS


def plain_votes(module: nn.Module) -> npt.NDArray[np.int64]:
    """The votes of the module itself, run on the very copies, uncompiled and in one batch."""
    noise = noise_for("exact", SIGMA)
    copies = noise.sample(image(), SEED, "estimation", 0, COPIES)
    with torch.inference_mode():
        logits = module.eval()(torch.from_numpy(copies).float().mul(noise.scale).permute(0, 3, 1, 2))
    return np.bincount(logits.argmax(1).numpy(), minlength=logits.shape[1])


def votes(module: nn.Module, **options: Any) -> npt.NDArray[np.int64]:
    with voter_of(module, input_shape=SHAPE, sigma=SIGMA, **{"batch": 64, "workers": 1, **options}) as voter:
        return voter.submit([Task(image(), SEED, Draw("estimation", 0, COPIES))]).result()[0]


class Negated(nn.Module):
    """Its last linear layer's output is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return -self.fc(x.flatten(1))  # type: ignore[no-any-return]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 5), nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.flatten(1)) + self.second(x.flatten(1)).relu()  # type: ignore[no-any-return]


class Unused(nn.Module):
    """A linear layer registered last that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.auxiliary = nn.Linear(192, 5), nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One linear layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = nn.Linear(192, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(self.inner(x.flatten(1))).relu())  # type: ignore[no-any-return]


class Tied(nn.Module):
    """The last layer's weights are used elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 192)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.linear(x.flatten(1), self.fc.weight.T))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """A Transformer block over the image's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(24, nhead=4, dim_feedforward=32, dropout=0.5, batch_first=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(x.permute(0, 2, 3, 1).flatten(2)).mean(1))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "hardtanh": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Hardtanh(-0.05, 0.05)),
    "hardtanh in place": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Hardtanh(-0.05, 0.05, inplace=True)),
    "softmax": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Softmax(1)),
    "negated": Negated,
    "two heads": TwoHeads,
    "an unused layer": Unused,
    "a layer called twice": Twice,
    "tied weights": Tied,
    "no linear layer": lambda: nn.Sequential(nn.Conv2d(3, 5, 8), nn.BatchNorm2d(5), nn.Flatten()),
    "a linear layer alone": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
    "a transformer block": Attention,
    "dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 64), nn.LayerNorm(64), nn.Dropout(0.5), nn.Linear(64, 5)
    ),
    "a linear layer over the width": lambda: nn.Sequential(nn.Linear(8, 5), nn.Flatten(), nn.LayerNorm(120)),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("name", NETWORKS)
def test_votes_are_the_plain_modules(name: str, engine: str) -> None:
    torch.manual_seed(3)
    module = NETWORKS[name]()
    expected = plain_votes(module)
    assert (expected > 0).sum() >= 2  # the comparison says something
    if (name, engine) == ("tied weights", "openvino"):  # OpenVINO gives this graph other logits: a clear refusal
        with pytest.raises(EngineError, match="does not compute the base classifier"):
            votes(module, engine=engine, precision="fp32", compile=False)
        return
    np.testing.assert_array_equal(votes(module, engine=engine, precision="fp32", compile=False), expected)


@pytest.mark.parametrize("name", ["hardtanh", "negated", "no linear layer", "a transformer block"])
def test_compiled_votes_are_too(name: str) -> None:
    torch.manual_seed(3)
    module = NETWORKS[name]()
    np.testing.assert_array_equal(votes(module, precision="fp32"), plain_votes(module))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_head_is_split_off_only_if_its_output_is_the_networks(name: str) -> None:
    torch.manual_seed(3)
    split = split_head(NETWORKS[name]().eval(), torch.rand(4, *SHAPE))
    assert (split is not None) == (
        name in ("an unused layer", "a linear layer alone", "a transformer block", "dropout")
    )


def test_what_does_not_end_in_a_linear_layer_stays_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    """bf16 logits would tie. The choice is logged."""
    with voter_of(Negated(), input_shape=SHAPE, sigma=SIGMA, batch=64, workers=1, compile=False) as voter:
        assert "-fp32-" in voter.engine
    assert "fp32" in caplog.text


def test_a_copy_of_the_module_votes() -> None:
    """The caller may go on training the module."""
    torch.manual_seed(0)
    module = Unused()
    expected = plain_votes(module)
    classifier = classifier_of(module, SHAPE)
    with torch.no_grad():
        module.fc.weight.neg_()
    options = VoterOptions(engine="torch", batch=64, workers=1, precision="fp32", compile=False)
    with open_voter(classifier, sigma=SIGMA, options=options) as voter:
        counted = voter.submit([Task(image(), SEED, Draw("estimation", 0, COPIES))]).result()[0]
    np.testing.assert_array_equal(counted, expected)


@st.composite
def small_networks(draw: st.DrawFn) -> nn.Module:
    """A convolution or none, up to three layers, and any ending."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers: list[nn.Module] = []
    features = 192
    if draw(st.booleans()):
        channels = draw(st.integers(1, 5))
        layers += [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)]
        features = 64 * channels
    layers.append(nn.Flatten())
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.integers(2, 9))
        layers += [
            nn.Linear(features, width),
            draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.Dropout(0.3), nn.GELU()])),
        ]
        features = width
    classes = draw(st.integers(2, 6))
    layers.append(nn.Linear(features, classes, bias=draw(st.booleans())))
    endings = (
        nn.Identity(),
        nn.Hardtanh(),
        nn.LogSoftmax(1),
        nn.LayerNorm(classes),
        nn.Softsign(),
        nn.ReLU6(inplace=True),
    )
    layers.append(draw(st.sampled_from(endings)))
    return nn.Sequential(*layers).eval()


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(module=small_networks(), engine=st.sampled_from(["torch", "onnx", "openvino"]))
def test_votes_of_random_small_networks(module: nn.Module, engine: str) -> None:
    """All but ties in the last bit: a copy whose two highest logits differ by less than 1e-5 may count for either."""
    noise = noise_for("exact", SIGMA)
    copies = noise.sample(image(), SEED, "estimation", 0, COPIES)
    with torch.inference_mode():
        logits = module(torch.from_numpy(copies).float().mul(noise.scale).permute(0, 3, 1, 2))
    top = logits.topk(2, dim=1).values
    ties = int((top[:, 0] - top[:, 1] < 1e-5).sum())
    counted = votes(module, engine=engine, precision="fp32", compile=False)
    assert np.abs(counted - plain_votes(module)).sum() <= 2 * ties


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Flatten(0), "must return logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(100, 5)), "cannot be run"),
        (nn.Conv2d(3, 5, 3), "must return logits"),
        (nn.LSTM(8, 5), "cannot be run"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), "must return logits"),
    ],
)
def test_what_is_no_base_classifier_is_refused(module: nn.Module, words: str) -> None:
    classifier = BaseClassifier.of_module(module, input_shape=SHAPE, classes=5)
    options = VoterOptions(engine="torch", batch=32, workers=1, precision="fp32", compile=False)
    with pytest.raises(EngineError, match=words):
        open_voter(classifier, sigma=SIGMA, options=options)


def test_logits_that_are_not_finite_are_refused() -> None:
    module = Unused()
    with torch.no_grad():
        module.fc.bias[0] = torch.nan
    with pytest.raises(EngineError, match="not finite"):
        votes(module, precision="fp32", compile=False)


class WithinTracing(nn.Module):
    """Another function under fx, which folds batch normalisation, than on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc(x.flatten(1))
        return -logits if isinstance(x, torch.fx.Proxy) else logits


def test_a_network_that_fx_misreads_is_run_as_it_is() -> None:
    torch.manual_seed(3)
    module = WithinTracing()
    np.testing.assert_array_equal(votes(module, precision="fp32", compile=False), plain_votes(module))


def shifted(masked: bool) -> nn.Module:
    """A normalisation as a hook, which fx drops; with a third class that is masked, or without."""
    torch.manual_seed(3)
    module = Unused()
    if masked:
        with torch.no_grad():
            module.fc.bias[2] = -1e9
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2 - 1,))
    return module


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hooks_are_part_of_the_network(masked: bool, precision: str) -> None:
    module = shifted(masked)
    counted, expected = votes(module, precision=precision, compile=False), plain_votes(module)
    assert np.abs(counted - expected).sum() <= (0 if precision == "fp32" else 20)
    without = Unused()
    without.load_state_dict(module.state_dict())
    assert np.abs(plain_votes(without) - expected).sum() > 40  # the comparison says something


def test_copies_whose_logits_are_not_finite_get_no_vote() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.fc(x.flatten(1))
            return torch.where(x.mean((1, 2, 3))[:, None] > 0.9, logits * torch.inf, logits)

    white = np.full((8, 8, 3), 255 << FRACTION_BITS, np.int32)
    with (
        voter_of(Overflowing(), input_shape=SHAPE, sigma=SIGMA, batch=32, workers=1, compile=False) as voter,
        pytest.raises(EngineError, match="not finite for this input"),
    ):
        voter.submit([Task(white, SEED, Draw("estimation", 0, 40))]).result()
