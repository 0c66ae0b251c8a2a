"""Whether a checkpoint and an image set mean the same by class 0, 1, 2, ..."""

from __future__ import annotations

import logging

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.class_names import NAMES_FILES
from macer_serve.datasets import ImageSet
from macer_serve.errors import ParameterError

log = logging.getLogger(__name__)


def require_same_classes(config: CheckpointConfig, images: ImageSet) -> None:
    """Raises `ParameterError` where the numbers of the classes do not mean the same on both sides.

    A class agrees if the checkpoint calls it by the set's name or by its folder's: names may have been added to the
    tree after training. A name that stands at another number is always refused. Names that the set does not know are
    refused where `macer train` took them from a set (there is a recipe): that was another set. Where they come from
    elsewhere, only their words may differ (car, automobile); they are reported and compared by number.
    """
    ours, theirs = config.classes, images.info.name
    if len(ours) != len(images.classes):
        raise ParameterError(
            f"{config.name} has {len(ours)} classes, {theirs} has {len(images.classes)}: "
            "it was trained on another data set"
        )
    known = list(zip(images.classes, images.folders, strict=True))
    strange = [i for i, names in enumerate(known) if ours[i] not in names]
    if not strange:
        return
    here = {name: i for i, names in enumerate(known) for name in names}
    # A checkpoint may call two classes alike, as ImageNet's two cranes: then either number will do.
    moved = [i for i in strange if ours[i] in here and ours[here[ours[i]]] != ours[i]]
    if moved:
        i = moved[0]
        raise ParameterError(
            f"class {i} of {config.name} is {ours[i]!r}, which is class {here[ours[i]]} of {theirs}: "
            "its classes are others, or in another order"
        )
    i = strange[0]
    name, folder = known[i]
    there = repr(name) if folder == name else f"{name!r} (folder {folder})"
    difference = f"class {i} of {config.name} is {ours[i]!r}, of {theirs} {there}"
    if config.recipe:
        remedy = "it was trained on other classes"
        if images.info.is_tree:
            remedy += f", or with a file of names that is missing here beside train and val ({', '.join(NAMES_FILES)})"
        raise ParameterError(f"{difference}: {remedy}")
    log.warning("%s; %d of %d names differ, classes are compared by number", difference, len(strange), len(known))
