"""The model digest names what determines the claim: editing notes buys no new noise, editing the claim does."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from macer_serve.checkpoint import CheckpointConfig, load_config

CONFIG = load_config("bundled:cifar10")
NOTES: dict[str, Any] = {
    "name": "another",
    "dataset": None,
    "seed": 12345,
    "recipe": {},
    "metrics": {"acr": 9.9},
    "quantization": {},
    "source": {"file": "x.pth"},
    "versions": {},
    "hierarchy": None,  # part of the policy, which has a digest of its own
}
CLAIM: dict[str, Any] = {
    "architecture": "resnet110",
    "classes": (*CONFIG.classes[:-1], "lorry"),
    "input_shape": (3, 32, 31),
    "mean": (0.5, 0.5, 0.25),
    "std": (0.5, 0.5, 0.25),
    "sigma": 0.5,
    "resize": 33,
    "files": {**CONFIG.files, "model.safetensors": "sha256:" + "0" * 64},
    "outputs": "probabilities",
}


def test_every_field_is_a_note_or_part_of_the_claim() -> None:
    assert {field.name for field in fields(CheckpointConfig)} == {*NOTES, *CLAIM, "schema_version"}


@pytest.mark.parametrize("name", NOTES)
def test_a_note_changes_nothing(name: str) -> None:
    edited = replace(CONFIG, **{name: NOTES[name]})
    assert edited.to_json() != CONFIG.to_json()
    assert edited.digest == CONFIG.digest


@pytest.mark.parametrize("name", CLAIM)
def test_the_claim_is_all_in_the_digest(name: str) -> None:
    assert replace(CONFIG, **{name: CLAIM[name]}).digest != CONFIG.digest


def test_the_digest_is_that_of_the_configuration_as_read_again() -> None:
    assert CheckpointConfig.from_json(CONFIG.to_json()).digest == CONFIG.digest
