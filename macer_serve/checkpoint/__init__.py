"""A smoothed classifier on disk: a folder of `config.json` and the network's files. Loading executes nothing."""

from macer_serve.checkpoint.config import GRAPH, INT8, SCHEMA_VERSION, WEIGHTS, CheckpointConfig
from macer_serve.checkpoint.folder import (
    BUNDLED,
    CONFIG,
    FILES,
    load_checkpoint,
    load_config,
    load_model,
    resolve,
    write_checkpoint,
)
from macer_serve.checkpoint.modules import describe_module
from macer_serve.checkpoint.saving import save_checkpoint

__all__ = [
    "BUNDLED",
    "CONFIG",
    "FILES",
    "GRAPH",
    "INT8",
    "SCHEMA_VERSION",
    "WEIGHTS",
    "CheckpointConfig",
    "describe_module",
    "load_checkpoint",
    "load_config",
    "load_model",
    "resolve",
    "save_checkpoint",
    "write_checkpoint",
]
