"""The images of a run: its training split, its held-out images, and the check that their files can be read."""

from __future__ import annotations

from macer_serve.datasets import ImageSet, load_dataset
from macer_serve.datasets.packed import load_pack
from macer_serve.errors import DataError
from macer_serve.evaluation.certify import spread_indices
from macer_serve.training.file_check import require_readable
from macer_serve.training.options import WITHOUT_HELD_OUT, Callbacks, TrainingOptions

_NAMED_AT_MOST = 6  # classes, in a message


def training_images(options: TrainingOptions) -> ImageSet:
    """Returns the training split, or its pack. Raises `DataError` if it is missing or has fewer than two classes."""
    if options.packed is not None:
        images, info = load_pack(options.packed, options.dataset)
        side = options.input_shape[0][1]
        if info.short_side < side:
            raise DataError(
                f"{options.packed} holds images of a short side of {info.short_side} pixels, and crops of {side} would "
                "be enlarged; pack with a larger side, or train at a smaller size",
                settings=("packed", "size"),
            )
    else:
        images = load_dataset(
            options.dataset, options.data_dir, "train", download=options.download, share=options.split
        )
    if len(images.classes) < 2:
        raise DataError(
            f"the training images under {options.data_dir} are all of one class, {images.classes[0]}; a classifier "
            "needs two or more. Each class is a folder, beside the others in train/"
        )
    return images


def held_out_images(options: TrainingOptions, classes: tuple[str, ...]) -> ImageSet | None:
    """Returns the test split, or None if no image is to be certified. Raises `DataError` if it does not fit."""
    if not options.held_out:
        return None
    try:
        images = load_dataset(options.dataset, options.data_dir, "test", download=options.download, share=options.split)
    except DataError as error:
        raise DataError(f"{error} {WITHOUT_HELD_OUT}", settings=(*error.settings, "held_out")) from error
    if images.classes != classes:
        only = {"train": set(classes) - set(images.classes), "test": set(images.classes) - set(classes)}
        what = "; ".join(f"only in {split}: {_listed(sorted(names))}" for split, names in only.items() if names)
        raise DataError(
            f"the test split of {options.dataset} has other classes than its training split ({what}); "
            "without held-out images (0 of them) it is not needed",
            settings=("held_out",),
        )
    return images


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def limited(total: int, limit: int | None) -> list[int]:
    """Returns the indices of the images of a tree that a limit leaves, spread evenly.

    A tree is sorted by class, and its first images would be of one class.
    """
    count = total if limit is None else min(limit, total)
    return [index * total // count for index in range(count)]


def check_images(options: TrainingOptions, callbacks: Callbacks) -> None:
    """Reads every image file that the run will need, before the hours of training.

    Raises `DataError` naming all files that cannot be read, and for a split that is missing or does not fit.
    """
    images = training_images(options)
    held_out = held_out_images(options, images.classes)
    if not images.info.is_tree:
        return
    paths = []
    if options.packed is None:
        paths = [images.source.samples[index][0] for index in limited(len(images), options.limit)]
    if held_out is not None:
        paths += [held_out.source.samples[i][0] for i in spread_indices(len(held_out), options.held_out)]
    if paths:
        require_readable(paths, progress=callbacks.checked)
