"""Claim: a pack feeds training several times as many images per core as the image files do.

    python benchmarks/loading.py --dataset imagenet --data-dir DIR [--split 0.1] [--size 224] [--images 400]

Decodes, crops, resizes and flips training images in one process with one thread, as each decoding process of
`macer train` does, from the files and from a pack that is made first. Prints images per second of CPU time, so that
other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from macer_serve.datasets import ImageSet, load_dataset
from macer_serve.datasets.packed import load_pack
from macer_serve.datasets.packing import pack
from macer_serve.training.data import AugmentedTree
from macer_serve.training.images import limited


def rate(images: ImageSet, size: int, count: int) -> float:
    """Returns training images per second of CPU time."""
    data, chosen = AugmentedTree(images, size, 0), limited(len(images), count)
    for index in chosen[:20]:
        data[0, index]
    began = time.process_time()
    for index in chosen:
        data[1, index]
    return len(chosen) / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="imagenet")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--split", type=float)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = load_dataset(options.dataset, options.data_dir, "train", share=options.split)
    files.source = type(files.source)(tuple(files.source.samples[i] for i in limited(len(files), options.images)))
    found = {"files": rate(files, options.size, options.images)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pack"
        began = time.process_time()
        pack(files, options.data_dir, out, short_side=options.short_side, progress=lambda done, total: None)
        print(f"packing: {len(files) / (time.process_time() - began):,.0f} images per second of CPU time")
        found["pack"] = rate(load_pack(out, options.dataset)[0], options.size, options.images)
    for name, speed in found.items():
        print(f"{name}: {speed:,.0f} images per second of CPU time at {options.size} pixels")


if __name__ == "__main__":
    main()
