"""Torch modules as users write them: those that can be captured, and those that are no function of their input."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (3, 4, 4)
CLASSES = ("a", "b", "c")
IMAGE = np.random.default_rng(1).integers(0, 256, (4, 4, 3)).astype(np.uint8)


def linear(seed: int = 0) -> nn.Linear:
    """A last layer whose classes win about equally often on noisy copies of `IMAGE`."""
    torch.manual_seed(seed)
    layer = nn.Linear(48, 3)
    pixels = torch.from_numpy(IMAGE).permute(2, 0, 1).reshape(1, 48) / 255
    with torch.no_grad():
        layer.weight *= 5
        layer.bias -= layer(pixels)[0]
    return layer


def balanced(net: nn.Module, last: nn.Module) -> nn.Module:
    """Returns the network in training mode, its last layer shifted such that no class wins on `IMAGE`."""
    pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        last.bias -= net.eval()(pixels)[0]  # type: ignore[operator]
    return net.train()


class Flat(nn.Module):
    """A linear network; what others are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


def of(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    """Returns a `Flat` network with another forward."""
    return type("Own", (Flat,), {"forward": forward})()  # type: ignore[no-any-return]


OUTSIDE = linear(1)


def _by_a_global(self: Any, x: Tensor) -> Tensor:
    return self.fc(x.flatten(1)) + OUTSIDE(x.flatten(1))  # type: ignore[no-any-return]


class Holding(Flat):
    """A network in a list, which is no submodule, and a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.scale = [linear(2)], 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.held[0](x.flatten(1))  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    net, other = Flat(), linear(3)
    net.register_forward_hook(lambda module, inputs, output: output + other(inputs[0].flatten(1)))
    net.fc.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    net.other = [other]  # type: ignore[assignment]  # for the test to change
    return net


def with_another_forward() -> nn.Module:
    """The instance's forward holds the instance itself, so that a copy would run the original."""
    net = nn.Sequential(nn.Flatten(), linear(), nn.Dropout(0.5))
    net.forward = lambda x: net[2](net[1](net[0](x)))  # type: ignore[method-assign]
    return net


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=1.0), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(16, 3, 1, bias=False), nn.BatchNorm2d(3, affine=False), nn.Flatten(), linear(),
    )  # fmt: skip
    return balanced(net, net[7])


def sharing() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Linear(48, 48), linear())
    net[2].weight = net[1].weight
    return net


def not_contiguous() -> nn.Module:
    net = Flat()
    net.fc.weight = nn.Parameter(net.fc.weight.detach().t().contiguous().t())
    assert not net.fc.weight.is_contiguous()
    return net


def parametrized(name: str) -> nn.Module:
    net = Flat()
    getattr(nn.utils.parametrizations, name)(net.fc)
    return balanced(net, net.fc)


def attending() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5, batch_first=True)
    net = nn.Sequential(nn.Flatten(2), layer, nn.Flatten(), linear())
    return balanced(net, net[3])


def compiled() -> nn.Module:
    net = Flat()
    net.compile()
    return net


class Remembering(Flat):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Positions(Flat):
    """Constants that forward makes, and one in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.01, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x - self.mean).float().flatten(1) + torch.arange(48, device=x.device) * 1e-3)  # type: ignore[no-any-return, operator]


def _in_place(self: Any, x: Tensor) -> Tensor:
    x.sub_(0.5).mul_(2.0)
    return self.fc(x.flatten(1))  # type: ignore[no-any-return]


CAPTURED: dict[str, Callable[[], nn.Module]] = {
    "plain": Flat,
    "a global network": lambda: of(_by_a_global),
    "a held network": Holding,
    "hooks": hooked,
    "another forward": with_another_forward,
    "dropout and batch norm": convolutional,
    "input changed in place": lambda: of(_in_place),
    "len": lambda: of(lambda self, x: self.fc(x.reshape(len(x), -1))),
    "shared weights": sharing,
    "not contiguous": not_contiguous,
    "weight norm": lambda: parametrized("weight_norm"),
    "spectral norm": lambda: parametrized("spectral_norm"),
    "attention": attending,
    "torch.compile": lambda: torch.compile(Flat()),  # type: ignore[dict-item, return-value]
    "compile": compiled,
    "remembers": Remembering,
    "positions": Positions,
}


class Counting(Flat):
    """Its logits depend on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x) * self.runs


class CountingInABuffer(Flat):
    """Its logits do not depend on how often it ran, but the count is part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1.0
        return super().forward(x)


def _always_in_training(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(self.fc(x.flatten(1)), torch.zeros(3), torch.ones(3), training=True)


def broken() -> nn.Module:
    net = Flat()
    with torch.no_grad():
        net.fc.bias[0] = torch.nan
    return net


def _raises(self: Any, x: Tensor) -> Tensor:
    raise ValueError("there are no pixels")


AGAIN, BATCH = "other logits when it is run again", "depend on the batch"

# Each with words of its refusal.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "counts": (Counting, AGAIN),
    "counts in a buffer": (CountingInABuffer, "changes its tensor runs while it runs"),
    "torch's chance": (lambda: of(lambda self, x: self.fc(x.flatten(1)) + torch.rand(3)), AGAIN),
    "Python's chance": (lambda: of(lambda self, x: self.fc(x.flatten(1)) * random.random()), AGAIN),
    "numpy's chance": (lambda: of(lambda self, x: self.fc(x.flatten(1)) * float(np.random.rand())), AGAIN),
    "dropout that stays": (lambda: of(lambda self, x: F.dropout(self.fc(x.flatten(1)), 0.5)), AGAIN),
    "batch statistics": (lambda: of(_always_in_training), r"cannot be run on float32 inputs \[1, 3, 4, 4\]"),
    "mean of the batch": (lambda: of(lambda self, x: self.fc((x - x.mean()).flatten(1))), BATCH),
    "decides by the batch": (lambda: of(lambda self, x: self.fc(x.flatten(1)) * (1 if len(x) > 2 else -1)), BATCH),
    "decides by a large batch": (
        lambda: of(lambda self, x: self.fc(x.flatten(1)) * (1 if x.shape[0] < 9 else -1)),
        "fixes the number of images, or decides by it",
    ),
    "fixed batch": (lambda: of(lambda self, x: self.fc(x.reshape(3, -1))), r"inputs \[1, 3, 4, 4\]"),
    "decides by pixels": (
        lambda: of(lambda self, x: self.fc(x.flatten(1)) * (1 if x.sum() < 1e9 else -1)),
        r"decides by the values of pixels\. Write the decision with torch\.where",
    ),
    "tuple": (lambda: of(lambda self, x: (self.fc(x.flatten(1)), x)), "returns a tuple; a tensor of logits"),
    "dict": (lambda: of(lambda self, x: {"logits": self.fc(x.flatten(1))}), "returns a dict; a tensor of logits"),
    "one rank more": (nn.Identity, r"returns \[3, 3, 4, 4\] for 3 image\(s\); \[3, classes\] is needed"),
    "squeezed": (lambda: of(lambda self, x: self.fc(x.flatten(1)).squeeze()), r"returns \[3\] for 1 image\(s\)"),
    "class numbers": (lambda: of(lambda self, x: self.fc(x.flatten(1)).argmax(1, True)), "returns int64; float32"),
    "other classes": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), r"returns \[3, 4\]; \[k, 3\] is needed"),
    "double": (lambda: Flat().double(), r"fc\.weight is float64, and float32 is needed: give copy\.deepcopy"),
    "half": (lambda: Flat().half(), r"fc\.weight is float16, and float32 is needed: give copy\.deepcopy"),
    "complex": (lambda: Flat().to(torch.complex64), r"fc\.weight is complex64, and float32 is needed\. Or export it"),
    "TorchScript": (lambda: torch.jit.script(Flat()), "TorchScript cannot be captured: give the module it was made of"),
    "not a number": (broken, "values that are not finite"),
    "raises": (lambda: of(_raises), r"inputs \[3, 3, 4, 4\]: there are no pixels"),
}


def _in_bf16(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.fc(x.flatten(1)).float()  # type: ignore[no-any-return]


BEYOND_ONNX: dict[str, Callable[[], nn.Module]] = {
    "singular values": lambda: of(lambda self, x: self.fc(x.flatten(1)) + torch.linalg.svdvals(x[:, 0])[:, :3]),
    "autocast": lambda: of(_in_bf16),
}
