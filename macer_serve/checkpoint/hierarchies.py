"""Files of hierarchies, which people write, and hierarchies of checkpoints that exist already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from macer_serve.atomic_writes import atomic_file
from macer_serve.checkpoint.config import CheckpointConfig
from macer_serve.checkpoint.folder import CONFIG, load_config, resolve
from macer_serve.checkpoint.limits import MAX_CONFIG_BYTES, read_bytes
from macer_serve.errors import CheckpointError, ParameterError, first_line
from macer_serve.smoothing.hierarchy import Hierarchy


def read_hierarchy(path: str | Path, classes: Sequence[str]) -> Hierarchy:
    """Returns the hierarchy of a YAML or JSON file, for classes of these names.

    `macer_serve.smoothing.hierarchy` describes the form. Raises `ParameterError`, which names the file.
    """
    import yaml

    try:
        return Hierarchy.from_json(yaml.safe_load(read_bytes(Path(path), MAX_CONFIG_BYTES)), classes)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ParameterError(f"{path}{line}: not YAML: {first_line(error)}") from error
    except (ParameterError, CheckpointError) as error:
        words = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise ParameterError(words) from error


def set_hierarchy(checkpoint: str | Path, hierarchy: Hierarchy | None) -> CheckpointConfig:
    """Writes another hierarchy, or none, into a checkpoint. Returns its configuration, whose digest stays the same.

    The policy changes, and with it the noise. Raises `CheckpointError`, also for a bundled checkpoint, which is part of
    the package, and `OutputError`.
    """
    if str(checkpoint).startswith("bundled:"):
        raise CheckpointError(
            f"{checkpoint} is part of the package and is not changed: copy the folder {resolve(checkpoint)}, and give "
            "the copy's path"
        )
    config = replace(load_config(checkpoint), hierarchy=hierarchy)
    with atomic_file(resolve(checkpoint) / CONFIG) as file:
        file.write((json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n").encode())
    return config
