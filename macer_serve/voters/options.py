"""What a user may say about engines: one value for the library, the command line and the YAML."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from macer_serve.errors import ParameterError

Device = Literal["cpu", "cuda", "tensorrt"]
Precision = Literal["auto", "fp32", "bf16", "int8"]

# Engines by name. Each module has `open_engines(classifier, options, passes) -> Iterator[Engine]`.
ENGINES = {
    "torch": "macer_serve.voters.torch",
    "onnx": "macer_serve.voters.onnx",
    "openvino": "macer_serve.voters.openvino",
}
DEVICES, PRECISIONS = get_args(Device), get_args(Precision)
MAX_BATCH = 8192


@dataclass(frozen=True, slots=True)
class VoterOptions:
    """How votes are computed. Every default is chosen by hardware and by the checkpoint's files, never by a timing.

    `engine` is `auto` or a name of `ENGINES`. `device` is `cpu`, `cuda`, or `tensorrt` (a
    GPU through onnxruntime's TensorRT); None takes a GPU if there is one. `batch` is the number of noisy copies per
    forward pass. `workers` is the number of CPU cores, one pass each; None takes all. `compile=False` runs torch
    without its compiler. Raises `ParameterError` at construction for values outside their range.
    """

    engine: str = "auto"
    device: Device | None = None
    precision: Precision = "auto"
    batch: int | None = None
    workers: int | None = None
    compile: bool = True

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a typing error in the YAML is refused

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "engine": ("auto", *ENGINES),
            "device": (None, *DEVICES),
            "precision": PRECISIONS,
        }
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                known = ", ".join(str(v) for v in values if v is not None)
                raise ParameterError(f"{name} must be one of {known}, not {value!r}")
        for name, most in (("batch", MAX_BATCH), ("workers", 1024)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise ParameterError(f"{name} must be a whole number between 1 and {most:,}, not {value!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns the names of the options, in order."""
        return tuple(f.name for f in fields(cls))
