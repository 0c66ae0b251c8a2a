"""Torch modules as checkpoint folders: weights of a named architecture, or the captured graph of any other module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from macer_serve.checkpoint.config import GRAPH, WEIGHTS, CheckpointConfig
from macer_serve.checkpoint.folder import write_checkpoint

if TYPE_CHECKING:
    from torch import nn


def save_checkpoint(model: nn.Module, config: CheckpointConfig, folder: str | Path) -> CheckpointConfig:
    """Writes a base classifier as a checkpoint; returns the configuration as written.

    A named architecture keeps its weights. Any other module is captured as it computes now and written as an ONNX
    graph, its normalisation included. Raises what `macer_serve.checkpoint.modules.describe_module` raises for a module
    that cannot be captured, and what `write_checkpoint` raises.
    """
    from macer_serve.architectures import is_named

    if not is_named(config.architecture):
        from macer_serve.checkpoint.modules import base_classifier_of

        config, classifier = base_classifier_of(model, config)
        return write_checkpoint(config, {GRAPH: classifier.graph()}, folder)
    from safetensors.torch import save

    weights = save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    return write_checkpoint(config, {WEIGHTS: weights}, folder)
