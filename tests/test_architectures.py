"""Base classifiers have the published sizes and normalise for themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from macer_serve.architectures import ARCHITECTURES, Normalise, base_classifier
from macer_serve.dry_run import output_shape
from macer_serve.errors import ParameterError

MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 2.0)


def build(name: str, classes: int = 10, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Sequential:
    channels = shape[0]
    return base_classifier(name, classes=classes, input_shape=shape, mean=MEAN[:channels], std=STD[:channels])


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_every_architecture(name: str) -> None:
    size = 64 if name == "resnet50" else 32
    model = build(name, 7, (3, size, size)).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet20", 0.27), ("resnet110", 1.73)],  # He et al. 2016, table 6 (digits as printed: 0.27M, 1.7M)
)
def test_published_sizes_of_cifar_resnets(name: str, millions: float) -> None:
    assert round(parameters(build(name)) / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "layers"), [("resnet20", 20), ("resnet110", 110)])
def test_depth_is_in_the_name(name: str, layers: int) -> None:
    modules = build(name).named_modules()
    weighted = [n for n, m in modules if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n]
    assert len(weighted) == layers


def test_size_of_resnet50() -> None:
    assert parameters(build("resnet50", 1000, (3, 224, 224))) == 25_557_032  # torchvision's own figure


def test_size_of_lenet() -> None:
    """Conv 5x5 20, conv 5x5 50, fc 500, fc 10 on 28x28 images."""
    expected = (25 + 1) * 20 + (20 * 25 + 1) * 50 + (50 * 16 + 1) * 500 + (500 + 1) * 10
    assert parameters(build("lenet", 10, (1, 28, 28))) == expected


def test_a_strided_stem_costs_no_more_than_the_network_it_widens() -> None:
    """Multiply-adds: doubled widths at half the resolution."""
    cost = {}
    for name in ("resnet20", "resnet20-s2"):
        total = 0

        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            nonlocal total
            assert isinstance(module, nn.Conv2d)
            total += output[0].numel() * module.weight[0].numel()

        model = build(name).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        with torch.no_grad():
            model(torch.rand(1, 3, 32, 32))
        cost[name] = total
    assert cost["resnet20-s2"] == pytest.approx(cost["resnet20"], rel=0.05)


def test_normalisation_is_the_first_layer() -> None:
    model = build("resnet20")
    assert isinstance(model[0], Normalise)
    x = torch.rand(4, 3, 5, 6)
    expected = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    assert torch.equal(model[0](x), expected)
    assert not [name for name in model.state_dict() if name.startswith("0.")], "its values live in config.json"


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ParameterError) as caught:
        build("resnet18")
    known = ", ".join(sorted(ARCHITECTURES))
    assert str(caught.value) == f"unknown architecture 'resnet18'; choose one of: {known}, or torchvision:NAME"


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ParameterError, match="at least 16x16, not 12x28"):
        build("lenet", 10, (1, 12, 28))
    with pytest.raises(ParameterError, match="3 channels, not 1"):
        build("resnet50", 10, (1, 64, 64))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "vgg11_bn", "swin_t"])
def test_logits_of_torchvision_networks(name: str) -> None:
    model = build(f"torchvision:{name}", 7).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert build(f"torchvision:{name}", 7).training, "as any new module"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet81", (3, 32, 32), "torchvision has no classification network 'resnet81'; its names include resnet"),
        ("", (3, 32, 32), "its names include resnet18"),
        ("ResNet18", (3, 32, 32), "torchvision has no classification network 'ResNet18'"),
        ("fcn_resnet50", (3, 64, 64), "fcn_resnet50 is no classification network for single images"),
        ("fasterrcnn_resnet50_fpn", (3, 64, 64), "is no classification network for single images"),
        ("r3d_18", (3, 64, 64), "is no classification network for single images"),
        ("quantized_resnet18", (3, 64, 64), "quantised networks are not supported"),
        ("inception_v3", (3, 299, 299), "auxiliary outputs"),
        ("googlenet", (3, 64, 64), "auxiliary outputs"),
        ("resnet18", (1, 28, 28), "torchvision:resnet18 takes images of 3 channels, not 1"),
        (
            "alexnet",
            (3, 32, 32),
            r"torchvision:alexnet cannot take images of 32x32 \(.*too small\); choose another size",
        ),
        ("vit_b_32", (3, 64, 64), "cannot take images of 64x64 .Wrong image height! Expected 224 but got 64!"),
    ],
)
def test_torchvision_networks_that_are_refused(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        build(f"torchvision:{name}", 7, shape)


def test_a_dry_run_leaves_the_network_as_it_is() -> None:
    network = build("resnet20").train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert output_shape(network, (3, 3, 32, 32)) == (3, 10)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
