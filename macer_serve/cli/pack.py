"""`macer pack`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from macer_serve.cli.data_options import data_options
from macer_serve.cli.exit_codes import STOPPED


@click.command("pack")
@data_options()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option(
    "--short-side", type=int, default=256, show_default=True, help="Larger images are resized to this short side."
)
def command(dataset: str, data_dir: Path, download: bool, split: float | None, out: Path, short_side: int) -> None:
    """Decode and resize the training images of a tree once, so that training reads pixels.

    `macer train --packed OUT` reads them, and crops and resizes them further. Evaluation and the server always read the
    image files. The same command goes on where it was stopped.
    """
    from tqdm import tqdm

    from macer_serve.datasets import load_dataset
    from macer_serve.datasets.packing import pack

    images = load_dataset(dataset, data_dir, "train", download=download, share=split)
    with tqdm(total=len(images), unit="image", desc="packing", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)

        try:
            info = pack(images, data_dir, out, short_side=short_side, progress=progress)
        except KeyboardInterrupt:
            bar.close()
            click.echo("macer: stopped; what is packed is kept. Run the same command again to continue.", err=True)
            sys.exit(STOPPED)
    size = sum(path.stat().st_size for path in out.iterdir())
    click.echo(f"wrote {out}  {info.images:,} images, {size / 2**30:.2f} GiB, made from {info.source}")
