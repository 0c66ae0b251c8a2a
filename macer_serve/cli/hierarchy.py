"""`macer hierarchy`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("hierarchy")
@click.argument("checkpoint")
@click.argument("file", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--remove", is_flag=True, help="Remove the hierarchy: no more coarse answers.")
def command(checkpoint: str, file: Path | None, remove: bool) -> None:
    """Print the hierarchy of CHECKPOINT (a folder, or bundled:NAME), or replace it by that of FILE.

    FILE is YAML or JSON: a list of partitions of the classes, each coarser than the one before.

    \b
    - animal: [bird, cat, deer, dog, frog, horse]
      vehicle: [airplane, automobile, ship, truck]

    Answers then name a group if no class is certified. Another hierarchy is another policy with other noise: choose it
    before you certify.
    """
    from macer_serve.checkpoint import load_config
    from macer_serve.checkpoint.hierarchies import read_hierarchy, set_hierarchy

    if file is not None and remove:
        raise click.UsageError("give a FILE or --remove, not both")
    config = load_config(checkpoint)
    if file is not None or remove:
        set_hierarchy(checkpoint, None if file is None else read_hierarchy(file, config.classes))
        click.echo(f"{checkpoint} has {'no' if file is None else 'this'} hierarchy now")
        return
    if config.hierarchy is None:
        click.echo(f"{checkpoint} has no hierarchy")
        return
    import yaml

    click.echo(
        yaml.safe_dump(
            config.hierarchy.to_json(config.classes), sort_keys=False, allow_unicode=True, default_flow_style=None
        ),
        nl=False,
    )
