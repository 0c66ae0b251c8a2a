"""Hostile and damaged state dict files: refused in words, nothing executed, memory bounded."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from importing.published import PublishedResNet
from test_checkpoint import Bomb

from macer_serve.errors import CheckpointError
from macer_serve.importing import Facts, import_model

FACTS = Facts(sigma=0.25, classes=10, value_range=(0, 1))


def weights() -> dict[str, Any]:
    return PublishedResNet(20).state_dict()


def refused(file: Path, words: str, arch: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=words):
        import_model(file, file.parent / "out", FACTS, arch=arch)
    assert not (file.parent / "out").exists()


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_execute_code_is_refused_unopened(writer: str, tmp_path: Path) -> None:
    target, file = tmp_path / "executed", tmp_path / "net.pth"
    content = {"state_dict": {**weights(), "bomb": Bomb(target)}}
    if writer == "pickle":
        file.write_bytes(pickle.dumps(content["state_dict"]["bomb"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=writer == "zip")
    for arch in (None, "torchvision:resnet18"):
        refused(file, "nothing in it was executed", arch)
    assert not target.exists()


def test_a_whole_pickled_module_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(PublishedResNet(20), tmp_path / "net.pth")
    refused(tmp_path / "net.pth", r"weights alone, by torch.save\(model.state_dict\(\), FILE\)")


def test_a_zip_bomb_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", pickle.dumps({}))
        archive.writestr("net/data/0", bytes(50_000_000))
    assert (tmp_path / "net.pth").stat().st_size < 100_000
    refused(tmp_path / "net.pth", "is compressed")


def test_an_archive_that_only_torch_finds_is_refused(tmp_path: Path) -> None:
    """Behind so many bytes Python's zipfile sees no archive, and could not say how far it expands; torch sees one."""
    file = tmp_path / "net.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", pickle.dumps({}))
        archive.writestr("net/data/0", bytes(50_000_000))
    file.write_bytes(file.read_bytes() + bytes(66_000))
    assert not zipfile.is_zipfile(file)
    refused(file, "cannot be read")


def test_tensors_larger_than_what_is_stored_are_refused(tmp_path: Path) -> None:
    torch.save({**weights(), "fc.weight": torch.zeros(1).expand(10**7, 10**5)}, tmp_path / "net.pth")
    refused(tmp_path / "net.pth", "fc.weight is larger than what the file stores")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_that_are_not_finite_are_refused(value: float, suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state, file = weights(), tmp_path / f"net.{suffix}"
    state["fc.weight"][0, 0] = value
    (save_file if suffix == "safetensors" else torch.save)(state, file)
    refused(file, "fc.weight has values that are not finite")


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "cannot be read"), (b"PK\x03\x04damaged", "cannot be read"), (b"\x80\x02}.", "cannot be read")],
)
def test_damaged_files_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(data)
    refused(tmp_path / "net.pth", words)


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"state_dict": {"fc.weight": 1}}, 5])
def test_what_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pth")
    refused(tmp_path / "net.pth", "holds")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("layer2.1.conv1.weight"), r"missing are layer2\.1\.conv1\.weight"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), r"unknown are extra\.weight"),
        (lambda s: s.update({"bn1.bias": torch.zeros(17)}), r"of another shape are bn1\.bias"),
        (lambda s: s.pop("fc.weight"), r"no last layer fc\.weight"),
    ],
)
def test_what_cannot_be_mapped_is_named(change: Any, words: str, tmp_path: Path) -> None:
    state = weights()
    change(state)
    torch.save({"arch": "cifar_resnet20", "state_dict": state}, tmp_path / "net.pth.tar")
    refused(tmp_path / "net.pth.tar", words)


def test_another_architecture_than_stated_is_refused(tmp_path: Path) -> None:
    torch.save({"arch": "cifar_resnet110", "state_dict": weights()}, tmp_path / "net.pth.tar")
    refused(tmp_path / "net.pth.tar", "its layers are not those of cifar_resnet110")
    torch.save({"first.weight": torch.zeros(2, 2)}, tmp_path / "net.pth")
    refused(tmp_path / "net.pth", "not those of a network that is known here")


def test_a_first_layer_that_is_no_normalisation_is_refused(tmp_path: Path) -> None:
    state = {"0.weight": torch.zeros(3), **{f"1.{name}": value for name, value in weights().items()}}
    torch.save({"arch": "cifar_resnet20", "state_dict": state}, tmp_path / "net.pth.tar")
    refused(tmp_path / "net.pth.tar", r"no normalisation, but has 0\.weight")


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.onnx", "is not a file")
    (tmp_path / "net.h5").write_bytes(b"")
    refused(tmp_path / "net.h5", r"cannot be imported: an \.onnx file can")
