"""Any torch module as a base classifier: its graph, its digest, its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from macer_serve.base_classifier import BaseClassifier, kind_of_outputs
from macer_serve.checkpoint.config import GRAPH, CheckpointConfig, digest_of
from macer_serve.checkpoint.same_logits import require_same_logits
from macer_serve.errors import EngineError, ParameterError
from macer_serve.onnx_graph import export_graph, reason_to_refuse

if TYPE_CHECKING:
    from torch import nn


def describe_module(
    module: nn.Module,
    *,
    sigma: float,
    classes: Sequence[str] | int,
    input_shape: tuple[int, int, int],
    resize: int | None = None,
    name: str | None = None,
) -> tuple[CheckpointConfig, BaseClassifier]:
    """Returns the configuration and the base classifier of what a module computes now, in eval mode.

    The base classifier is a captured graph, see `macer_serve.checkpoint.capture`: what becomes of the module later
    changes nothing. The configuration names the ONNX form of that graph. Raises `ParameterError` for a module that
    cannot be captured or has another number of classes, `CheckpointError` for facts outside their range, `EngineError`
    if the graph cannot be written as ONNX, `EngineMismatchError` if onnxruntime computes other logits than torch.
    """
    channels, height, width = input_shape
    config = CheckpointConfig(
        name=name or type(module).__name__,
        architecture="onnx",
        classes=tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes),
        input_shape=(channels, height, width),
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        sigma=sigma,
        resize=resize or max(height, width),
        files={GRAPH: digest_of(b"")},  # replaced below
    )
    return base_classifier_of(module, config)


def base_classifier_of(module: nn.Module, config: CheckpointConfig) -> tuple[CheckpointConfig, BaseClassifier]:
    """Returns the configuration of a module's ONNX checkpoint, and its base classifier, captured.

    Raises what `describe_module` raises, and `ParameterError` if the configuration states a normalisation.
    """
    from torch import nn

    from macer_serve.checkpoint.capture import INSTEAD, captured

    if not isinstance(module, nn.Module):
        raise ParameterError(f"a torch.nn.Module is needed, not {type(module).__name__}")
    if any(config.mean) or any(std != 1.0 for std in config.std):
        raise ParameterError("the normalisation of a module is part of it: give mean 0 and std 1, and let it normalise")
    network = captured(module, config.input_shape, config.sigma)
    try:
        proto = export_graph(network, config.input_shape)
        if reason := reason_to_refuse(proto):
            raise ParameterError(f"the module is refused: {reason}. {INSTEAD}")
        graph: bytes = proto.SerializeToString(deterministic=True)
        logits = require_same_logits(graph, network, config.input_shape, config.sigma)
    except EngineError as error:
        raise type(error)(f"{error}. {INSTEAD}") from error
    if logits.shape[1] != len(config.classes):
        raise ParameterError(f"the module returns {list(logits.shape)}; [k, {len(config.classes)}] is needed")
    config = replace(
        config, architecture="onnx", files={GRAPH: digest_of(graph)}, outputs=kind_of_outputs(logits), quantization={}
    )
    classifier = BaseClassifier(config.input_shape, len(config.classes), load_module=lambda: network, onnx=graph)
    return config, classifier
