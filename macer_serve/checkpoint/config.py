"""`config.json`: everything a checkpoint means besides its weights."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from macer_serve.checkpoint.limits import MAX_CLASSES, MAX_INPUT_VALUES, MAX_RESIZE, SIGMA_RANGE
from macer_serve.errors import CheckpointError, ParameterError
from macer_serve.smoothing.hierarchy import Hierarchy

SCHEMA_VERSION = 2

# A checkpoint's files beside config.json. One of the first two holds the network; the last is its quantised form.
WEIGHTS, GRAPH, INT8 = "model.safetensors", "model.onnx", "model.int8.onnx"

_OPTIONAL = ("hierarchy", "outputs", "source")
_CLAIM = ("architecture", "classes", "files", "input_shape", "mean", "outputs", "resize", "sigma", "std")
_DIGEST = re.compile("sha256:[0-9a-f]{64}")


def digest_of(data: bytes) -> str:
    """Returns `sha256:...` of the bytes, as configurations name files."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Returns the canonical bytes of a JSON value, for digests: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value))


def _all(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, tuple) and all(map(kind, values))


# What each field must be, in words and as a test.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("name must be text", _is_text),
    "architecture": ("architecture must be text", _is_text),
    "classes": ("classes must be a list of names", _all(_is_text)),
    "input_shape": (
        "input_shape must be [1 or 3, height, width], whole numbers",
        lambda value: _all(_is_whole)(value) and len(value) == 3,
    ),
    "mean": ("mean must be a list of numbers", _all(_is_number)),
    "std": ("std must be a list of numbers", _all(_is_number)),
    "sigma": ("sigma must be a number", _is_number),
    "resize": ("resize must be a whole number", _is_whole),
    "dataset": ("dataset must be text", lambda value: value is None or _is_text(value)),
    "seed": ("seed must be a whole number", lambda value: value is None or _is_whole(value)),
    "hierarchy": ("hierarchy must be one", lambda value: value is None or isinstance(value, Hierarchy)),
    "outputs": ("outputs must be logits or probabilities", _is_text),
    **{
        name: (f"{name} must be an object", _is_object)
        for name in ("files", "recipe", "metrics", "quantization", "source", "versions")
    },
}
_LONGEST_NAME = 200  # every certificate repeats it
_LARGEST = 1e12  # of a normalisation; beyond, fp32 arithmetic overflows or loses the image


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What a checkpoint means. `mean`, `std` in pixel values in [0, 1], as is `sigma`; `input_shape` is C, H, W.

    `files` are the digests of the files beside config.json, by name. `quantization` says how the int8 file was made
    and how often its class differs from the fp32 network's; it is empty if there is none.

    `resize` is the length to which an upload's short side is brought before the centre crop to `input_shape`.

    `outputs` says what the network returns: `logits`, or `probabilities` if it ends in a softmax. Hard votes are the
    same for both; the soft bound needs logits. `source` says from which file a network was imported.

    `hierarchy` groups the classes for coarse answers. It is part of the policy, not of the claim's model: changing it
    gives other noise, but the same `digest`.
    Raises `CheckpointError` at construction if a field is outside its range.
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
    hierarchy: Hierarchy | None = None
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if wrong := [words for name, (words, fits) in _KINDS.items() if not fits(getattr(self, name))]:
            raise CheckpointError(f"config.json: {wrong[0]}")
        channels, height, width = self.input_shape
        low, high = SIGMA_RANGE
        problems = {
            "name must not be empty": not self.name,
            f"name must be of at most {_LONGEST_NAME} characters": len(self.name) > _LONGEST_NAME,
            f"2 to {MAX_CLASSES:,} classes are needed: at least two classes, each with its name": not (
                2 <= len(self.classes) <= MAX_CLASSES
            ),
            f"sigma must lie in [{low:g}, {high:g}]": not low <= self.sigma <= high,
            "input_shape must be [1 or 3, height, width]": channels not in (1, 3) or height < 1 or width < 1,
            f"input_shape must be of at most {MAX_INPUT_VALUES:,} values": channels * height * width > MAX_INPUT_VALUES,
            "mean and std need one value per channel": len(self.mean) != channels or len(self.std) != channels,
            "mean and std must be finite": not all(map(math.isfinite, (*self.mean, *self.std))),
            "std must be positive": any(v <= 0 for v in self.std),
            f"mean must lie within {_LARGEST:g}, and std in [{1 / _LARGEST:g}, {_LARGEST:g}]": not all(
                abs(m) <= _LARGEST and 1 / _LARGEST <= s <= _LARGEST for m, s in zip(self.mean, self.std, strict=False)
            ),
            "outputs must be logits or probabilities": self.outputs not in ("logits", "probabilities"),
            "resize must be at least the input's short side": self.resize < min(height, width),
            "resize must reach the input's long side on square uploads": self.resize < max(height, width),
            f"resize must be at most {MAX_RESIZE}": self.resize > MAX_RESIZE,
            f"files must name {WEIGHTS} or {GRAPH}": not {WEIGHTS, GRAPH} & set(self.files),
            f"files may name {WEIGHTS}, {GRAPH} and {INT8} only": not set(self.files) <= {WEIGHTS, GRAPH, INT8},
            "files must give each file's digest, sha256:<64 hex digits>": not all(
                isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in self.files.values()
            ),
        }
        for message, wrong_value in problems.items():
            if wrong_value:
                raise CheckpointError(f"config.json: {message}")
        try:
            if self.hierarchy is not None:
                self.hierarchy.check(self.classes)
            canonical_json(self.to_json())
        except ParameterError as error:
            raise CheckpointError(f"config.json: {error}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"config.json: every number must be finite, and every text valid Unicode ({error})"
            ) from error

    @property
    def digest(self) -> str:
        """Returns `sha256:...` of what determines the claim: the network's files and `_CLAIM`.

        The noise of an image follows from this digest. Editing the name, the metrics or other notes changes nothing.
        """
        whole = self.to_json() | {"outputs": self.outputs}
        # 1, 1.0 and -0.0 against 0.0: one claim must have one digest, or each way to write it would be another chance.
        whole |= {
            "sigma": float(self.sigma),
            **{name: [float(v) + 0.0 for v in whole[name]] for name in ("mean", "std")},
        }
        return digest_of(canonical_json({name: whole[name] for name in _CLAIM}))

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as JSON. Fields that few checkpoints need are left out if they say nothing."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        data["hierarchy"] = None if self.hierarchy is None else self.hierarchy.to_json(self.classes)
        return {k: v for k, v in data.items() if not (k in _OPTIONAL and v in ("logits", {}, None))}

    @classmethod
    def from_json(cls, data: Any) -> CheckpointConfig:
        """Returns the configuration that `to_json` wrote. Raises `CheckpointError`, which names what is wrong."""
        if not isinstance(data, dict):
            raise CheckpointError("config.json: expected a JSON object")
        if data.get("schema_version") != SCHEMA_VERSION or isinstance(data["schema_version"], float):
            raise CheckpointError(
                f"config.json: schema_version {ascii(data.get('schema_version'))[:40]} is not understood "
                f"(this version reads {SCHEMA_VERSION})"
            )
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            shown = ", ".join(unknown)[:200].encode("ascii", "backslashreplace").decode()
            raise CheckpointError(f"config.json: unknown fields {shown}")
        lists = ("classes", "input_shape", "mean", "std")
        if wrong := [k for k in lists if k in data and not isinstance(data[k], list)]:
            raise CheckpointError(f"config.json: {', '.join(wrong)} must be a list")
        values: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in data.items()}
        try:
            if (written := values.get("hierarchy")) is not None:
                values["hierarchy"] = Hierarchy.from_json(written, values.get("classes"))
            return cls(**values)
        except ParameterError as error:
            raise CheckpointError(f"config.json: {error}") from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: {error}") from error
