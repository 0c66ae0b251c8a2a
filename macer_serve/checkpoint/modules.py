"""Any torch module as a base classifier: its graph, its digest, its configuration."""

from __future__ import annotations

import copy
import hashlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from macer_serve.base_classifier import BaseClassifier, kind_of_outputs, probe_pixels
from macer_serve.checkpoint.config import GRAPH, WEIGHTS, CheckpointConfig, digest_of
from macer_serve.errors import EngineError, ParameterError
from macer_serve.onnx_graph import export_graph

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


def graph_of_module(module: nn.Module, config: CheckpointConfig) -> tuple[CheckpointConfig, bytes]:
    """Returns the configuration of the module's ONNX checkpoint, and the graph's bytes, compared with torch.

    The module's normalisation is part of the graph. Raises `ParameterError` if the configuration states one, or another
    number of classes than the module has; `EngineError` if torch cannot export the module; `EngineMismatchError` if
    onnxruntime computes other logits than torch.
    """
    from macer_serve.checkpoint.export import require_same_logits

    if any(config.mean) or any(std != 1.0 for std in config.std):
        raise ParameterError("the normalisation of a module is part of it: give mean 0 and std 1, and let it normalise")
    plain = copy.deepcopy(module).eval().cpu()
    graph: bytes = export_graph(plain, config.input_shape).SerializeToString(deterministic=True)
    logits = require_same_logits(graph, plain, config.input_shape, config.sigma)
    if logits.ndim != 2 or logits.shape[1] != len(config.classes):
        raise ParameterError(f"the module returns {list(logits.shape)}; [k, {len(config.classes)}] is needed")
    files = {GRAPH: digest_of(graph)}
    return replace(config, architecture="onnx", files=files, outputs=kind_of_outputs(logits)), graph


def describe_module(
    module: nn.Module,
    *,
    sigma: float,
    classes: Sequence[str] | int,
    input_shape: tuple[int, int, int],
    resize: int | None = None,
    name: str | None = None,
) -> tuple[CheckpointConfig, BaseClassifier]:
    """Returns the configuration and the base classifier of a module in eval mode, a copy of it.

    The configuration, and so its digest, is the one that `save_checkpoint` writes: it names the module's ONNX graph,
    which holds its weights and its structure. A module that torch cannot export has a digest of its weights and a
    random number instead, since its structure cannot be identified: a warning says so. Raises `ParameterError`,
    `CheckpointError`, `EngineError`.
    """
    from torch import nn

    if not isinstance(module, nn.Module):
        raise ParameterError(f"from_module takes a torch.nn.Module, not {type(module).__name__}")
    plain = copy.deepcopy(module).eval().cpu()
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    channels, height, width = input_shape
    config = CheckpointConfig(
        name=name or type(module).__name__,
        architecture="module",
        classes=names,
        input_shape=(channels, height, width),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        sigma=sigma,
        resize=resize or max(height, width),
        files={WEIGHTS: _digest_of_this_object(plain)},
    )
    graph = None
    try:
        config, graph = graph_of_module(plain, config)
    except EngineError as error:
        config = replace(config, outputs=_outputs(plain, config))
        log.warning(
            "%s. Its structure has no digest: certificates name this object in this process, and nobody can repeat "
            "them with another copy of the network",
            error,
        )
    classifier = BaseClassifier(config.input_shape, len(names), load_module=lambda: plain, onnx=graph)
    return config, classifier


def _digest_of_this_object(module: nn.Module) -> str:
    """Returns `sha256:...` of the module's weights and a random number."""
    digest = hashlib.sha256(secrets.token_bytes(32))
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.detach().contiguous().flatten().numpy().tobytes())
    return "sha256:" + digest.hexdigest()


def _outputs(module: nn.Module, config: CheckpointConfig) -> Literal["logits", "probabilities"]:
    """Returns what the module returns; `logits` for a module that does not run, which the voter refuses in words."""
    import torch

    try:
        with torch.inference_mode():
            outputs = module(torch.from_numpy(probe_pixels(3, config.input_shape, config.sigma)))
        return kind_of_outputs(outputs.float().numpy())
    except Exception:  # whatever a module raises
        return "logits"
