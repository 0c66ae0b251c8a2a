"""A radius for class 3 is about the checkpoint's class 3: an image set must mean the same by every number."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from brightness import config

from macer_serve.datasets import ImageSet, dataset_info
from macer_serve.errors import ParameterError
from macer_serve.evaluation.classes import require_same_classes

NAMES, FOLDERS = ("tench", "goldfish", "crane (n3)", "crane (n4)"), ("n1", "n2", "n3", "n4")


def check(classes: tuple[str, ...], *, trained: bool, names: tuple[str, ...] = NAMES) -> None:
    recipe: dict[str, Any] = {"method": "macer"} if trained else {}
    ours = replace(config(), classes=classes, recipe=recipe)
    require_same_classes(ours, ImageSet(dataset_info("imagenet"), [], names, FOLDERS))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("classes", [NAMES, FOLDERS, ("tench", "n2", "n3", "crane (n4)")])
def test_a_class_may_be_called_by_its_name_or_its_folder(
    classes: tuple[str, ...], trained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of names may have been put beside the tree after training."""
    check(classes, trained=trained)
    assert not caplog.records


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (NAMES[:3], "has 3 classes, imagenet has 4"),
        (("goldfish", "tench", *NAMES[2:]), "class 0 of .* is 'goldfish', which is class 1 of imagenet"),
        (("n1", "n3", "n2", "n4"), "class 1 of .* is 'n3', which is class 2 of imagenet"),
        (("carp", "tench", "goldfish", "n5"), "class 1 of .* is 'tench', which is class 0 of imagenet"),
    ],
)
def test_another_number_or_order_is_refused(classes: tuple[str, ...], message: str, trained: bool) -> None:
    with pytest.raises(ParameterError, match=message):
        check(classes, trained=trained)


def test_folders_sorted_as_text_are_not_classes_sorted_as_numbers() -> None:
    """ImageFolder puts 10 before 2."""
    by_number = tuple(str(i) for i in range(12))
    images = ImageSet(dataset_info("folder"), [], tuple(sorted(by_number)))
    with pytest.raises(ParameterError, match=r"class 2 of .* is '2', which is class 4 of folder"):
        require_same_classes(replace(config(), classes=by_number), images)


def test_after_training_here_one_other_class_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"class 3 of .* is 'n5', of imagenet 'crane \(n4\)' \(folder n4\)"):
        check(("tench", "goldfish", "n3", "n5"), trained=True)
    with pytest.raises(ParameterError, match="a file of names that is missing here beside train and val"):
        check(NAMES, trained=True, names=FOLDERS)


def test_names_from_elsewhere_may_be_other_words(caplog: pytest.LogCaptureFixture) -> None:
    """Published ImageNet lists call both cranes crane."""
    with caplog.at_level(logging.WARNING):
        check(("tench", "gold fish", "crane", "crane"), trained=False)
        check(("tench", "goldfish", "crane", "crane"), trained=False, names=("tench", "goldfish", "crane", "n4"))
    assert "class 1 of" in caplog.messages[0]
    assert "3 of 4 names differ, classes are compared by number" in caplog.messages[0]
    assert "1 of 4 names differ" in caplog.messages[1]
