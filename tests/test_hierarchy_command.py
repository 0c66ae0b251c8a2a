"""`macer hierarchy` prints and replaces a checkpoint's groups, and refuses what is no partition in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from macer_serve.architectures import base_classifier
from macer_serve.checkpoint import WEIGHTS, CheckpointConfig, load_config, save_checkpoint
from macer_serve.cli import main
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.policy import policy_digest

CLASSES = ("cat", "dog", "ship")
ANIMALS = "- animal: [cat, dog]\n  vehicle: [ship]\n"


def macer(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["hierarchy", *(str(a) for a in arguments)])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"input_shape": (1, 28, 28), "mean": (0.0,), "std": (1.0,)}
    config = CheckpointConfig(
        name="m", architecture="lenet", classes=CLASSES, sigma=0.25, resize=28, files={WEIGHTS: "sha256:" + 64 * "0"},
        **shape,
    )  # fmt: skip
    save_checkpoint(base_classifier("lenet", classes=3, **shape), config, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def policy_of(checkpoint: Path) -> str:
    """Returns the digest of the policy by which an answer would be made."""
    config = load_config(checkpoint)
    return policy_digest(SmoothedClassifier(config).policy_plan(Plan()), "exact")


def test_a_hierarchy_is_set_printed_and_removed(checkpoint: Path, tmp_path: Path) -> None:
    before, digest = policy_of(checkpoint), load_config(checkpoint).digest
    assert macer(checkpoint).output == f"{checkpoint} has no hierarchy\n"
    file = tmp_path / "groups.yaml"
    file.write_text(ANIMALS)
    result = macer(checkpoint, file)
    assert (result.exit_code, result.output) == (0, f"{checkpoint} has this hierarchy now\n")
    assert policy_of(checkpoint) != before, "another hierarchy is another policy"
    assert load_config(checkpoint).digest == digest, "of the same model"
    printed = tmp_path / "printed.yaml"
    printed.write_text(macer(checkpoint).output)
    assert macer(checkpoint, printed).exit_code == 0, "what is printed can be read"
    hierarchy = load_config(checkpoint).hierarchy
    assert hierarchy is not None
    assert hierarchy.names(1) == ("animal", "vehicle")
    assert macer(checkpoint, "--remove").exit_code == 0
    assert load_config(checkpoint).hierarchy is None
    assert policy_of(checkpoint) == before


def test_the_bundled_hierarchy_is_printed_and_is_not_replaced() -> None:
    before = macer("bundled:cifar10").output
    assert "animal" in before
    result = macer("bundled:cifar10", "--remove")
    assert result.exit_code not in (0, 1)
    assert "is part of the package and is not changed: copy the folder" in result.output
    assert macer("bundled:cifar10").output == before


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- animal: [cat, dog]\n", "ship"),
        ("- animal: [cat, dog, ship]\n", "at least two groups"),
        ("- animal: [cat]\n  vehicle: [ship]\n", "dog"),
        ("- animal: [cat, dog, ship]\n  vehicle: [ship]\n", "ship"),
        ("- animal: [cat, dog, horse]\n  vehicle: [ship]\n", "horse"),
        ("- animal: cat\n", "animal"),
        ("just words\n", "groups.yaml"),
        ("a: [cat, dog\n", "groups.yaml"),
        ("", "groups.yaml"),
        ("- animal: [cat, dog]\n  vehicle: [ship]\n- one: [cat]\n  two: [dog, ship]\n", "animal"),
    ],
)
def test_what_is_no_hierarchy_is_refused_in_one_line(checkpoint: Path, tmp_path: Path, text: str, word: str) -> None:
    before = load_config(checkpoint)
    file = tmp_path / "groups.yaml"
    file.write_text(text)
    result = macer(checkpoint, file)
    assert result.exit_code not in (0, 1), result.output
    assert word in result.output
    assert "(--" not in result.output, "no option gave it"
    assert "Traceback" not in result.output
    assert load_config(checkpoint) == before


def test_a_file_and_remove_together_are_a_usage_error(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "groups.yaml"
    file.write_text(ANIMALS)
    result = macer(checkpoint, file, "--remove")
    assert result.exit_code == 2
    assert "not both" in result.output
