"""Weights in other files: taken in from the ONNX file's own folder, refused from anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from importing.unfit_graphs import FACTS, WEIGHTS, changed, plain, refused
from onnx import TensorProto

from macer_serve.errors import CheckpointError
from macer_serve.importing import import_model


def external(location: str, **more: str) -> Any:
    def change(model: Any) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            weight.external_data.add(key=key, value=value)

    return changed(change)


@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "/etc/hostname", "link.bin", "sub/../../secret.bin"],
    ids=["up", "root", "link", "dots"],
)
def test_weights_outside_the_files_folder_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(WEIGHTS.astype(np.float32).tobytes())
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    refused(external(location), folder, CheckpointError, "outside its folder")


def test_weights_beside_the_file_are_taken_in(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"0000" + WEIGHTS.astype(np.float32).tobytes())
    onnx.save(plain(), tmp_path / "whole.onnx")
    (tmp_path / "net.onnx").write_bytes(external("w.bin", offset="4").SerializeToString())
    whole, parts = (import_model(tmp_path / f"{n}.onnx", tmp_path / f"{n} out", FACTS) for n in ("whole", "net"))
    assert whole.files == parts.files


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "absent.bin"}, "are missing"),
        ({"location": "w.bin", "length": "99999999999"}, "shorter than"),
        ({"location": "w.bin", "offset": str(2**70)}, "shorter than"),
        ({"location": "w.bin", "offset": "9" * 5000}, "cannot be read"),
        ({"location": "a\0b"}, "cannot be read"),
        ({"location": "w.bin", "offset": "-1"}, "are missing"),
        ({"location": "w.bin", "offset": "x"}, "cannot be read"),
        ({"location": "w.bin", "length": "8"}, "damaged|valid"),
    ],
)
def test_damaged_external_data_are_refused(entries: dict[str, str], words: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHTS.astype(np.float32).tobytes())
    refused(external(**entries), tmp_path, CheckpointError, words)
