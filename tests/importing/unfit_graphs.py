"""ONNX graphs near one that imports, and the check that a graph is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from importing.foreign_files import SIGMA, linear_model, model_of
from onnx import helper

from macer_serve.errors import MacerError
from macer_serve.importing import Facts, import_model

WEIGHTS = np.random.default_rng(0).integers(-4, 5, (5, 3, 4, 4))
BIASES = -WEIGHTS.sum((1, 2, 3)) * 128.0
FACTS = Facts(sigma=SIGMA, classes=5, value_range=(0, 255))


def plain() -> Any:
    return linear_model(WEIGHTS, BIASES)


def refused(model: Any, folder: Path, kind: type[MacerError], words: str, facts: Facts = FACTS) -> None:
    folder.mkdir(exist_ok=True)
    file = folder / "net.onnx"
    file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(kind, match=words):
        import_model(file, folder / "out", facts)
    assert not (folder / "out").exists()


def changed(change: Callable[[Any], object]) -> Any:
    model = plain()
    change(model)
    return model


def with_nodes(*nodes: Any, outputs: Any = ("batch", 5), opset: int = 17, **weights: Any) -> Any:
    return model_of(list(nodes), weights, inputs=["batch", 3, 4, 4], outputs=outputs, opset=opset)


def set_input(kind: int, *sizes: Any) -> Callable[[Any], None]:
    return lambda model: model.graph.input[0].CopyFrom(helper.make_tensor_value_info("in", kind, sizes))


FLATTEN, RANDOM = helper.make_node("Flatten", ["in"], ["flat"]), np.float32(WEIGHTS.reshape(5, -1).T)
