"""`config.json`: everything a checkpoint means besides its weights."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from macer_serve.errors import CheckpointError

SCHEMA_VERSION = 2

# A checkpoint's files beside config.json. One of the first two holds the network; the last is its quantised form.
WEIGHTS, GRAPH, INT8 = "model.safetensors", "model.onnx", "model.int8.onnx"

_IMPORTED = ("outputs", "source")
_DIGEST = re.compile("sha256:[0-9a-f]{64}")


def digest_of(data: bytes) -> str:
    """Returns `sha256:...` of the bytes, as configurations name files."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, UTF-8. Digests and macs are taken of it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What a checkpoint means. `mean`, `std` in pixel values in [0, 1], as is `sigma`; `input_shape` is C, H, W.

    `files` are the digests of the files beside config.json, by name. `quantization` says how the int8 file was made
    and how often its class differs from the fp32 network's; it is empty if there is none.

    `resize` is the length to which an upload's short side is brought before the centre crop to `input_shape`.

    `outputs` says what the network returns: `logits`, or `probabilities` if it ends in a softmax. Hard votes are the
    same for both; the soft bound needs logits. `source` says from which file a network was imported.
    Raises `CheckpointError` at construction where a field is outside its range.
    """

    name: str
    architecture: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sigma: float
    resize: int
    files: dict[str, str]
    dataset: str | None = None
    seed: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    outputs: Literal["logits", "probabilities"] = "logits"
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        channels, height, width = self.input_shape
        problems = {
            "name must not be empty": not self.name,
            "at least two classes are needed": len(self.classes) < 2,
            "sigma must lie in [0.005, 4]": not 0.005 <= self.sigma <= 4.0,
            "input_shape must be [1 or 3, height, width]": channels not in (1, 3) or height < 1 or width < 1,
            "mean and std need one value a channel": len(self.mean) != channels or len(self.std) != channels,
            "mean and std must be finite": not all(math.isfinite(v) for v in (*self.mean, *self.std)),
            "std must be positive": any(v <= 0 for v in self.std),
            "outputs must be logits or probabilities": self.outputs not in ("logits", "probabilities"),
            "resize must be at least the input's short side": self.resize < min(height, width),
            "resize must reach the input's long side on square uploads": self.resize < max(height, width),
            f"files must name {WEIGHTS} or {GRAPH}": not {WEIGHTS, GRAPH} & set(self.files),
            f"files may name {WEIGHTS}, {GRAPH} and {INT8} only": not set(self.files) <= {WEIGHTS, GRAPH, INT8},
            "files must give each file's digest, sha256:<64 hex digits>": not all(
                isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in self.files.values()
            ),
        }
        for message, wrong in problems.items():
            if wrong:
                raise CheckpointError(f"config.json: {message}")

    @property
    def digest(self) -> str:
        """`sha256:...` of the whole configuration, the files' digests included: the identity of the classifier."""
        return "sha256:" + hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as JSON. The fields of imported networks are left out if they say nothing, so that
        the digests of older checkpoints stay what they were.
        """
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {k: v for k, v in data.items() if not (k in _IMPORTED and v in ("logits", {}))}

    @classmethod
    def from_json(cls, data: Any) -> CheckpointConfig:
        """The configuration that `to_json` wrote; raises `CheckpointError` naming what is missing or wrong."""
        if not isinstance(data, dict):
            raise CheckpointError("config.json: expected a JSON object")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"config.json: schema_version {data.get('schema_version')!r} is not understood "
                f"(this version reads {SCHEMA_VERSION})"
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise CheckpointError(f"config.json: unknown fields {', '.join(unknown)}")
        if not isinstance(data.get("files", {}), dict):
            raise CheckpointError("config.json: files must be an object")
        lists = ("classes", "input_shape", "mean", "std")
        if wrong := [k for k in lists if k in data and not isinstance(data[k], list)]:
            raise CheckpointError(f"config.json: {', '.join(wrong)} must be a list")
        values: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in data.items()}
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: {error}") from error
