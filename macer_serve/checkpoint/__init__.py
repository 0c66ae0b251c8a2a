"""A smoothed classifier on disk: a folder of `config.json` and `model.safetensors`. Loading executes nothing."""

from macer_serve.checkpoint.config import SCHEMA_VERSION, CheckpointConfig
from macer_serve.checkpoint.folder import BUNDLED, load_config, load_model, resolve, save_checkpoint

__all__ = [
    "BUNDLED",
    "SCHEMA_VERSION",
    "CheckpointConfig",
    "load_config",
    "load_model",
    "resolve",
    "save_checkpoint",
]
