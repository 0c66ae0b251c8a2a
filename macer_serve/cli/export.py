"""`macer export`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("checkpoint")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The ONNX file to write.")
def command(checkpoint: str, out: Path) -> None:
    """Write the base classifier of CHECKPOINT (a folder, or bundled:NAME) as an ONNX file.

    The graph maps `pixels` [batch, C, H, W], values in [0, 1], to `logits` [batch, classes]. The normalisation is part
    of the graph. Sigma, the classes and the checkpoint's digest are in the file's metadata.
    """
    from macer_serve.checkpoint.export import export_onnx

    digest = export_onnx(checkpoint, out)
    click.echo(f"wrote {out}  {digest}")
