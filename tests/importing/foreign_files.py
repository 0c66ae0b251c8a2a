"""Networks and files in the layouts that users bring, made by other code than what reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
import torchvision
from click.testing import CliRunner, Result
from importing.published import BufferedNormalisation, PlainNormalisation, PublishedLeNet, PublishedResNet
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from macer_serve.cli import main

SIGMA = 0.25
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
Logits = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


def picture(shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Returns random pixels [H, W, C]: the image that tests vote on."""
    channels, height, width = shape
    return np.random.default_rng(1).integers(0, 256, (height, width, channels)).astype(np.uint8)


def with_spread_votes(module: nn.Module, head: nn.Linear, shape: tuple[int, int, int]) -> nn.Module:
    """Returns the module with random statistics, its last layer such that several classes win under noise."""
    torch.manual_seed(7)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn_like(layer.bias) * 0.1
            layer.running_var = 0.5 + torch.rand_like(layer.bias)
    module.eval()
    with torch.no_grad():
        pixels = torch.from_numpy(picture(shape)).permute(2, 0, 1) / 255
        logits = module(pixels + SIGMA * torch.randn(32, *shape))
        spread = logits.std(0)
        head.weight /= spread[:, None]
        head.bias /= spread
        head.bias -= (logits / spread).mean(0)
    return module


def of_module(module: nn.Module) -> Logits:
    def logits(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return module(torch.from_numpy(pixels)).numpy()  # type: ignore[no-any-return]

    return logits


@dataclass(frozen=True)
class Case:
    """A file, the options that import it, the original's logits of pixels, and the input's shape."""

    file: Path
    options: tuple[str, ...]
    logits: Logits
    shape: tuple[int, int, int]


def resnet18(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = torchvision.models.resnet18(weights=None, num_classes=6)
    with_spread_votes(normalised(network), network.fc, (3, 32, 32))
    return network


IMAGENET = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")


def normalised(network: nn.Module) -> nn.Module:
    return nn.Sequential(PlainNormalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), network)


def torchvision_weights(folder: Path) -> Case:
    network = resnet18()
    torch.save(network.state_dict(), folder / "resnet18.pth")
    options = ("--arch", "torchvision:resnet18", "--classes", "6", "--input-shape", "3,32,32", *IMAGENET)
    return Case(folder / "resnet18.pth", options, of_module(normalised(network)), (3, 32, 32))


def torchvision_onnx(folder: Path) -> Case:
    """torch's exporter puts the weights into a second file."""
    network = resnet18()
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        network,
        (torch.zeros(2, 3, 32, 32),),
        folder / "resnet18.onnx",
        dynamo=True,
        dynamic_shapes=batch,
        verbose=False,
    )
    assert (folder / "resnet18.onnx.data").is_file()
    return Case(folder / "resnet18.onnx", ("--classes", "6", *IMAGENET), of_module(normalised(network)), (3, 32, 32))


def published(depth: int, *layers: nn.Module) -> nn.Module:
    """Returns the network behind the layers."""
    torch.manual_seed(depth)
    network = PublishedResNet(depth)
    return with_spread_votes(nn.Sequential(*layers, network) if layers else network, network.fc, (3, 32, 32))


def cohen(folder: Path) -> Case:
    """A normalisation layer without numbers in the file, old pickles, an optimiser beside the weights."""
    network = published(20, PlainNormalisation(CIFAR_MEAN, CIFAR_STD))
    momentum = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).state_dict()
    content = {"epoch": 90, "arch": "cifar_resnet20", "state_dict": network.state_dict(), "optimizer": momentum}
    torch.save(content, folder / "cohen.pth.tar", _use_new_zipfile_serialization=False)
    mean, std = (",".join(map(str, values)) for values in (CIFAR_MEAN, CIFAR_STD))
    options = ("--classes", "10", "--mean", mean, "--std", std)
    return Case(folder / "cohen.pth.tar", options, of_module(network), (3, 32, 32))


def safetensors(folder: Path) -> Case:
    """A bare state dict, whose architecture an option names."""
    from safetensors.torch import save_file

    case, content = cohen(folder), torch.load(folder / "cohen.pth.tar", weights_only=True)
    save_file(content["state_dict"], folder / "cohen.safetensors")
    return Case(folder / "cohen.safetensors", (*case.options, "--arch", "cifar_resnet20"), case.logits, case.shape)


def salman(folder: Path) -> Case:
    """The layer only subtracts the mean; the network was wrapped by DataParallel."""
    network = published(20, PlainNormalisation(CIFAR_MEAN, (1.0,) * 3))
    state = {name.replace("1.", "1.module.", 1): value for name, value in network.state_dict().items()}
    torch.save({"epoch": 1, "arch": "cifar_resnet20", "state_dict": state}, folder / "salman.pth.tar")
    mean = ",".join(map(str, CIFAR_MEAN))
    return Case(folder / "salman.pth.tar", ("--classes", "10", "--mean", mean), of_module(network), (3, 32, 32))


def macer(folder: Path) -> Case:
    """No normalisation layer: nothing is missing but sigma and the classes."""
    network = published(110)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"arch": "resnet110", "state_dict": state, "epoch": 440}, folder / "macer.pth.tar")
    return Case(folder / "macer.pth.tar", ("--classes", "10"), of_module(network), (3, 32, 32))


def buffered(folder: Path) -> Case:
    """A normalisation layer with its numbers in the file, and MACER's own key."""
    network = published(20, BufferedNormalisation(CIFAR_MEAN, CIFAR_STD))
    torch.save({"net": network.state_dict(), "epoch": 1}, folder / "440.pth")
    return Case(folder / "440.pth", ("--classes", "10"), of_module(network), (3, 32, 32))


def lenet(folder: Path) -> Case:
    torch.manual_seed(0)
    network = PublishedLeNet()
    with_spread_votes(network, network.fc2, (1, 28, 28))
    torch.save({"net": network.state_dict(), "epoch": 90}, folder / "90.pth")
    return Case(folder / "90.pth", ("--classes", "10"), of_module(network), (1, 28, 28))


def linear_model(weights: npt.NDArray[Any], biases: npt.NDArray[Any], *, batch: int | str = "batch") -> Any:
    """Returns the graph of weights [classes, C, H, W] on rounded bytes: exact in fp32 for integers."""
    classes, *shape = weights.shape
    return model_of(
        [
            helper.make_node("Round", ["in"], ["whole"]),
            helper.make_node("Flatten", ["whole"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w", "b"], ["out"], transB=1),
        ],
        {"w": weights.reshape(classes, -1).astype(np.float32), "b": biases.astype(np.float32)},
        inputs=[batch, *shape],
        outputs=[batch, classes],
    )


def model_of(
    nodes: list[Any], weights: dict[str, npt.NDArray[Any]], *, inputs: Any, outputs: Any, opset: int = 17
) -> Any:
    """Returns a model from `in` to `out`."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def linear(folder: Path) -> Case:
    """Integer weights on bytes, at a batch of one only."""
    generator = np.random.default_rng(0)
    weights = generator.integers(-4, 5, (5, 3, 4, 4))
    biases = -weights.sum((1, 2, 3)) * 128 + generator.integers(-200, 200, 5)
    onnx.save(linear_model(weights, biases, batch=1), folder / "linear.onnx")

    def logits(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        whole = np.rint(pixels * 255.0).reshape(len(pixels), -1)
        return (whole @ weights.reshape(5, -1).T + biases).astype(np.float32)

    return Case(folder / "linear.onnx", ("--classes", "5", "--range", "0,255"), logits, (3, 4, 4))


def smoothing_filter(channels: int = 3) -> npt.NDArray[np.float32]:
    kernel = np.zeros((channels, channels, 3, 3), np.float32)
    for c in range(channels):
        kernel[c, c] = 1 / 9
    return kernel


def denoised(folder: Path) -> Case:
    """A filter as denoiser, in an older operator set than the classifier."""
    torch.manual_seed(5)
    kernel, size = smoothing_filter(), ["n", 3, 16, 16]
    head = nn.Linear(8, 4)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(14), nn.Flatten(), head)
    denoiser = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    denoiser.load_state_dict({"weight": torch.from_numpy(kernel)})
    whole = with_spread_votes(nn.Sequential(denoiser, normalised(network)), head, (3, 16, 16))
    nodes = [helper.make_node("Conv", ["in", "k"], ["out"], pads=[1, 1, 1, 1])]
    onnx.save(model_of(nodes, {"k": kernel}, inputs=size, outputs=size, opset=13), folder / "denoiser.onnx")
    batch = ({0: torch.export.Dim("batch")},)
    example = (torch.zeros(2, 3, 16, 16),)
    torch.onnx.export(network, example, folder / "small.onnx", dynamo=True, dynamic_shapes=batch, verbose=False)
    options = ("--classes", "4", *IMAGENET, "--denoiser", str(folder / "denoiser.onnx"))
    return Case(folder / "small.onnx", options, of_module(whole), (3, 16, 16))


CASES: dict[str, Callable[[Path], Case]] = {
    "torchvision": torchvision_weights,
    "onnx": torchvision_onnx,
    "cohen": cohen,
    "salman": salman,
    "safetensors": safetensors,
    "macer": macer,
    "buffers": buffered,
    "lenet": lenet,
    "linear": linear,
    "denoiser": denoised,
}


def macer(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])
