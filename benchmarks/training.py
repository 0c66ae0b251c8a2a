"""Claim: our loop trains several times as many images per second as a plain eager fp32 loop written from the papers.

    python benchmarks/training.py --data-dir DIR [--arch resnet20] [--images 2048] [--k 4]

Each method is measured twice in one run on one machine with all cores: by `macer train` as users start it (with its own
precision, compilation, data order, augmentation and logs), and by the method's algorithm as plainly as PyTorch allows.
CIFAR-10, sigma = 0.25, batch 128 (SmoothAdv: 128 / k images per step, as published). Of two epochs of `--images` images
the second counts, since the first compiles. The ratio depends on the hardware's bf16 arithmetic.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macer_serve.architectures import base_classifier
from macer_serve.datasets import dataset_info, load_dataset
from macer_serve.hardware import usable_cores
from macer_serve.training.options import TrainingOptions
from macer_serve.training.recipe import Recipe
from macer_serve.training.recipes import recipe
from macer_serve.training.run import run_training

SIGMA, BATCH = 0.25, 128
Loss = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]


def plain_gaussian(model: nn.Module, x: Tensor, y: Tensor, r: Recipe) -> Tensor:
    return F.cross_entropy(model(x + r.sigma * torch.randn_like(x)), y)


def plain_macer(model: nn.Module, x: Tensor, y: Tensor, r: Any) -> Tensor:
    """Zhai et al. 2020, Algorithm 1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    copies = x.repeat_interleave(r.k, 0)
    z = model(copies + r.sigma * torch.randn_like(copies)).view(len(x), r.k, -1)
    loss = -torch.log(z.softmax(2).mean(1).gather(1, y[:, None]) + 1e-10).sum()
    top, index = (r.beta * z).softmax(2).mean(1).topk(2)
    right = index[:, 0] == y
    xi = normal.icdf(top[right, 0]) - normal.icdf(top[right, 1])
    inside = torch.isfinite(xi) & (xi.abs() <= r.gamma)
    top = top[right][inside]
    hinge = r.gamma - (normal.icdf(top[:, 0]) - normal.icdf(top[:, 1]))
    return (loss + r.lam * r.sigma / 2 * hinge.sum()) / len(x)


def plain_smoothadv(model: nn.Module, x: Tensor, y: Tensor, r: Any) -> Tensor:
    """Salman et al. 2019, Pseudocode 1, PGD."""
    noise = r.sigma * torch.randn(len(x), r.k, *x.shape[1:])
    delta = torch.zeros_like(x, requires_grad=True)
    model.eval()
    for _ in range(r.attack_steps):
        z = model((x + delta)[:, None].add(noise).flatten(0, 1)).view(len(x), r.k, -1)
        loss = -torch.log(z.softmax(2).mean(1).gather(1, y[:, None]).clamp_min(1e-20)).sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta += 2 * r.epsilon / r.attack_steps * F.normalize(gradient.flatten(1)).view_as(delta)
            delta.copy_((x + delta).clamp(0, 1) - x)
            delta.copy_(delta.flatten(1).renorm(2, 0, r.epsilon).view_as(delta))
    model.train()
    return F.cross_entropy(model((x + delta.detach())[:, None].add(noise).flatten(0, 1)), y.repeat_interleave(r.k))


PLAIN: dict[str, Loss] = {"gaussian": plain_gaussian, "macer": plain_macer, "smoothadv": plain_smoothadv}


def plain_rate(r: Recipe, images: Tensor, labels: Tensor, arch: str) -> float:
    """Returns the images per second of one epoch of the plain loop."""
    torch.set_num_threads(usable_cores())
    info = dataset_info("cifar10")
    model = base_classifier(arch, classes=10, input_shape=info.input_shape, mean=info.mean, std=info.std).train()
    optimizer = torch.optim.SGD(model.parameters(), r.lr, momentum=r.momentum, weight_decay=r.weight_decay)
    began = time.perf_counter()
    for at in range(0, len(images), r.batch):
        x = images[at : at + r.batch].float().div(255).permute(0, 3, 1, 2).contiguous()
        loss = PLAIN[r.method](model, x, labels[at : at + r.batch], r)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(images) / (time.perf_counter() - began)


def our_rate(r: Recipe, data_dir: Path, images: int, arch: str) -> tuple[float, str]:
    """Returns the images per second of the second epoch of `macer train`, and its precision."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checkpoint"
        options = TrainingOptions("cifar10", data_dir, out, r.method, r.sigma, arch=arch, limit=images, held_out=0)
        config = run_training(options, r)
        log = (out.with_name("checkpoint.run") / "log.jsonl").read_text().splitlines()
    return json.loads(log[1])["images_per_second"], json.dumps(config.recipe["precision"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--attack-steps", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=list(PLAIN), default=list(PLAIN))
    options = parser.parse_args()
    arrays = load_dataset("cifar10", options.data_dir, "train").arrays()
    assert arrays is not None
    pixels, labels = (torch.from_numpy(a[: options.images]) for a in arrays)
    for method in options.methods:
        r = recipe("cifar10", method, SIGMA).with_options(epochs=2, batch=BATCH, milestones=(), lr=0.01)
        if method != "gaussian":
            r = r.with_options(k=options.k)
        if method == "smoothadv":
            r = r.with_options(batch=BATCH // options.k, attack_steps=options.attack_steps, ramp=0)
        ours, how = our_rate(r, options.data_dir, options.images, options.arch)
        plain = plain_rate(r, pixels, labels, options.arch)
        epoch = 50_000 / ours
        print(
            f"{method:10} k {r.to_json().get('k', 1)}, batch {r.batch}: "
            f"ours {ours:7.1f} images/s ({epoch:6.0f} s for 50,000), plain {plain:7.1f}, {ours / plain:.2f}x   {how}",
            flush=True,
        )


if __name__ == "__main__":
    main()
