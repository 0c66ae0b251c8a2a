"""Checks that a checkpoint and an image set number the same classes."""

from __future__ import annotations

import logging

from macer_serve.checkpoint import CheckpointConfig
from macer_serve.class_names import NAMES_FILES
from macer_serve.datasets import ImageSet
from macer_serve.errors import ParameterError

log = logging.getLogger(__name__)


def require_same_classes(config: CheckpointConfig, images: ImageSet) -> None:
    """Raise `ParameterError` if a class number means one class in the checkpoint and another class in the image set.

    A class agrees if the checkpoint's name is the set's name or the folder's name, because a file of names may have
    been added after training. A name that the set has at another number is always refused. Names that the set lacks are
    refused if `macer train` made the checkpoint (it has a recipe): the checkpoint was trained on another set. In other
    checkpoints the same class may have another word (car, automobile). Such names are logged and compared by number.
    """
    ours, theirs = config.classes, images.info.name
    if len(ours) != len(images.classes):
        raise ParameterError(
            f"{config.name} has {len(ours)} classes, {theirs} has {len(images.classes)}: "
            "the checkpoint was trained on another data set"
        )
    known = list(zip(images.classes, images.folders, strict=True))
    strange = [i for i, names in enumerate(known) if ours[i] not in names]
    if not strange:
        return
    here = {name: i for i, names in enumerate(known) for name in names}
    # Two classes of a checkpoint may have one name, such as ImageNet's two cranes. Either number is right then.
    moved = [i for i in strange if ours[i] in here and ours[here[ours[i]]] != ours[i]]
    if moved:
        i = moved[0]
        raise ParameterError(
            f"class {i} of {config.name} is {ours[i]!r}, which is class {here[ours[i]]} of {theirs}: "
            "the checkpoint has other classes, or the same in another order"
        )
    i = strange[0]
    name, folder = known[i]
    there = repr(name) if folder == name else f"{name!r} (folder {folder})"
    difference = f"class {i} of {config.name} is {ours[i]!r}, of {theirs} {there}"
    if config.recipe:
        cause = "the checkpoint was trained on other classes"
        if images.info.is_tree:
            cause += f", or with a file of names that is missing here beside train and val ({', '.join(NAMES_FILES)})"
        raise ParameterError(f"{difference}: {cause}")
    log.warning("%s; %d of %d names differ, classes are compared by number", difference, len(strange), len(known))
