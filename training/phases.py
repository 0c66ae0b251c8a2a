"""Runs of one phase or several. Each phase starts from the weights that the phase before it ended with.

OUT.run/
├── phase-1, phase-1.run/    checkpoint and run of the first phase, if there are several
├── state-*.pt, log.jsonl    the last phase's, as of any run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.errors import ParameterError
from macer_serve.training.options import Callbacks, TrainingOptions
from macer_serve.training.recipe import Recipe
from macer_serve.training.run import require_free, run_training


def run_phases(
    options: TrainingOptions, phases: Sequence[Recipe], callbacks: Callbacks | None = None
) -> CheckpointConfig:
    """Trains one phase after the other, writes `options.out` and returns its configuration.

    The checkpoint records the recipes of all phases. Called again, it continues: a phase that is complete is
    checked to be of the same settings, and its checkpoint is written again. Raises what `run_training` raises.
    """
    if not phases:
        raise ParameterError("a run needs one phase or more")
    callbacks = callbacks or Callbacks()
    require_free(options.out)
    earlier: list[dict[str, object]] = []
    for number, recipe in enumerate(phases, start=1):
        callbacks.phase(number, recipe)
        last = number == len(phases)
        out = options.out if last else options.folder / f"phase-{number}"
        config = run_training(
            replace(options, out=out, method=recipe.method, sigma=recipe.sigma, earlier=tuple(earlier)),
            recipe,
            callbacks,
        )
        earlier.append({name: value for name, value in config.recipe.items() if name != "earlier"})
        options = replace(options, init=str(out))
    return config
