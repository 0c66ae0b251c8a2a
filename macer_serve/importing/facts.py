"""What a network's file may lack: noise level, classes, input shape, normalisation, resize, name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from macer_serve.checkpoint.limits import MAX_CLASSES, MAX_INPUT_VALUES, MAX_RESIZE, SIGMA_RANGE
from macer_serve.errors import MissingFactsError, ParameterError

NORMALISATION = ("mean", "std", "value_range")
LARGEST = 1e6  # of a normalisation: networks read values near 1, or bytes
_WORDS = {
    "sigma": "the sigma of the noise that it was trained for",
    "classes": "the names of its classes",
    "input_shape": "the shape of its input",
    "value_range": "how pixel values are to be normalised",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a network means besides its weights; None is unknown.

    `classes` are names, or only their number. `input_shape` is (C, H, W). The network reads the pixel values x in
    [0, 1] as ((low + (high - low) x) - mean) / std, `value_range` being (low, high); `mean` and `std` have one value,
    or one per channel. `resize` is the short side of uploads before the crop, by default the input's longer side.
    Raises `ParameterError` at construction for values outside their range.
    """

    sigma: float | None = None
    classes: tuple[str, ...] | int | None = None
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    value_range: tuple[float, float] | None = None
    resize: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        low, high = self.value_range or (0.0, 1.0)
        given = {"mean": self.mean or (), "std": self.std or (), "the range of values": (low, high)}
        classes = self.classes if isinstance(self.classes, int) else len(self.classes or (None, None))
        problems = {
            f"sigma must lie in [{SIGMA_RANGE[0]:g}, {SIGMA_RANGE[1]:g}]": self.sigma is not None
            and not SIGMA_RANGE[0] <= self.sigma <= SIGMA_RANGE[1],
            f"there must be 2 to {MAX_CLASSES:,} classes": self.classes is not None and not 2 <= classes <= MAX_CLASSES,
            "mean, std and the range of values must be finite": not all(
                math.isfinite(v) for values in given.values() for v in values
            ),
            "std must be positive": any(v <= 0 for v in self.std or ()),
            f"the range of values must ascend, not {low:g} to {high:g}": not low < high,
            **{
                f"{name} must lie within {LARGEST:g}": any(abs(v) > LARGEST for v in values)
                for name, values in given.items()
            },
            f"std must be at least {1 / LARGEST:g}": any(v < 1 / LARGEST for v in self.std or ()),
            f"the range of values must span at least {1 / LARGEST:g}": high - low < 1 / LARGEST,
            "the input shape must be three positive sizes, C, H, W": self.input_shape is not None
            and (len(self.input_shape) != 3 or min(self.input_shape) < 1),
            f"the input shape must be of at most {MAX_INPUT_VALUES:,} values": self.input_shape is not None
            and math.prod(self.input_shape) > MAX_INPUT_VALUES,
            f"resize must lie in 1 to {MAX_RESIZE}": self.resize is not None and not 1 <= self.resize <= MAX_RESIZE,
        }
        for message, wrong in problems.items():
            if wrong:
                raise ParameterError(message)

    def filled_from(self, stated: Facts) -> Facts:
        """Returns these facts, completed by those that the file states.

        A normalisation given here replaces the whole of the file's. Raises `ParameterError` for another input shape
        than the file's.
        """
        shapes = self.input_shape, stated.input_shape
        if None not in shapes and shapes[0] != shapes[1]:
            raise ParameterError(f"the file is a network for inputs {stated.input_shape}, not {self.input_shape}")
        names = [f.name for f in fields(self)]
        if any(getattr(self, name) is not None for name in NORMALISATION):
            names = [name for name in names if name not in NORMALISATION]
        return replace(self, **{n: getattr(stated, n) for n in names if getattr(self, n) is None})

    def require_complete(self, file: str) -> None:
        """Raise `MissingFactsError`, naming all that is unknown and has no default."""
        missing = [name for name in ("sigma", "classes", "input_shape") if getattr(self, name) is None]
        if all(getattr(self, name) is None for name in NORMALISATION):
            missing.append("value_range")
        if missing:
            words = ", ".join(_WORDS[name] for name in missing)
            raise MissingFactsError(f"{file} does not state {words}", tuple(missing))

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and std per channel in pixel values: the network reads (x - mean) / std.

        Raises `ParameterError` if there are neither one nor `channels` values.
        """
        low, high = self.value_range or (0.0, 1.0)
        mean, std = self.mean or (0.0,), self.std or (1.0,)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ParameterError(f"{name} needs one value, or one for each of {channels} channels: {values}")
        scale = high - low
        mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
        return tuple((m - low) / scale for m in mean), tuple(s / scale for s in std)

    def class_names(self, outputs: int) -> tuple[str, ...]:
        """Returns one name per output. Raises `ParameterError` unless the number of classes is that of outputs."""
        known = tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else self.classes or ()
        if len(known) != outputs:
            raise ParameterError(f"the network has {outputs} outputs, and {len(known)} classes were named")
        return known
