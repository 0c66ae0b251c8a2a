"""`macer quantize`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from macer_serve.cli.data_options import data_options


@click.command("quantize")
@click.argument("checkpoint")
@data_options(dataset_default="the set that the checkpoint was trained on")
@click.option("--held-out", type=click.IntRange(1), default=2000, show_default=True, help="Images to compare on.")
def command(
    checkpoint: str, dataset: str | None, data_dir: Path, download: bool, split: float | None, held_out: int
) -> None:
    """Add an int8 form of its network to CHECKPOINT (a folder, or bundled:NAME).

    Scales are calibrated on noisy training images. On CPUs that multiply int8 (AVX-512 VNNI, AVX-VNNI, AMX) the int8
    file then runs by default, about twice as fast. The int8 network is a base classifier of its own. The share of noisy
    test images on which its class differs from the fp32 network's is printed and stored.
    """
    from dataclasses import replace

    from tqdm import tqdm

    from macer_serve.checkpoint import INT8, load_config
    from macer_serve.checkpoint.quantize import calibration_size, quantize_checkpoint
    from macer_serve.datasets import load_dataset
    from macer_serve.errors import ParameterError
    from macer_serve.evaluation.certify import spread_indices
    from macer_serve.evaluation.classes import require_same_classes
    from macer_serve.evaluation.noisy import noisy_copies
    from macer_serve.issuing import EvaluationSeed
    from macer_serve.smoothed import SmoothedClassifier

    config = load_config(checkpoint)
    name = dataset or config.dataset
    if name is None:
        raise ParameterError(f"{checkpoint} does not say what it was trained on; name the set by --dataset")
    train = load_dataset(name, data_dir, "train", download=download, share=split)
    test = load_dataset(name, data_dir, "test", download=download, share=split)
    require_same_classes(config, train)
    # The seed depends on the files. Without the int8 file, quantising again draws the same noise.
    files = {file: digest for file, digest in config.files.items() if file != INT8}
    first = replace(config, files=files, quantization={})
    classifier = SmoothedClassifier(first, issuer=EvaluationSeed.named("macer quantize"))
    sizes = {"calibration": calibration_size(config.input_shape), "held out": held_out}
    copies = []
    for (what, size), images in zip(sizes.items(), (train, test), strict=True):
        indices = spread_indices(len(images), size)
        with tqdm(total=len(indices), desc=what, unit="image", file=sys.stderr, leave=False) as bar:
            copies.append(noisy_copies(classifier, images, indices, progress=bar.update))
    source = {"dataset": name, "noise": classifier.noise.name}
    click.echo(f"quantising on {len(copies[0])} noisy training images of {name} ...", err=True)
    config = quantize_checkpoint(checkpoint, copies[0], copies[1], source=source)
    share = config.quantization["disagreement"]
    click.echo(
        f"wrote the int8 file of {checkpoint}: other classes on {share:.2%} of {len(copies[1])} noisy test images"
    )
