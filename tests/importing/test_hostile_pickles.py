"""Hostile and damaged state dict files: refused in words, nothing executed, memory bounded."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from digit_checkpoints import Bomb
from importing.published import PublishedResNet

from macer_serve.checkpoint.limits import read_bytes
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


NO_WEIGHTS: dict[str, tuple[str, Callable[[], torch.Tensor], str]] = {
    "no values": ("fc.weight", lambda: torch.zeros(10, 0), "of another shape are fc.weight"),
    "any number of classes": ("fc.weight", lambda: torch.zeros(2**40, 0), "1,099,511,627,776 classes"),
    "no dimension": ("fc.weight", lambda: torch.tensor(1.0), "no last layer"),
    "whole numbers": ("fc.weight", lambda: torch.zeros(10, 64, dtype=torch.int64), "another type of numbers are fc"),
    "truth values": ("bn1.bias", lambda: torch.zeros(16, dtype=torch.bool), "another type of numbers are bn1.bias"),
    "complex numbers": ("bn1.bias", lambda: torch.zeros(16, dtype=torch.complex64), "torch.ComplexFloatStorage"),
    "float8": ("bn1.bias", lambda: torch.zeros(16).to(torch.float8_e4m3fn), "_rebuild_tensor_v3"),
    "sparse": ("bn1.bias", lambda: torch.zeros(16).to_sparse(), "_rebuild_sparse_tensor"),
    "without data": ("bn1.bias", lambda: torch.zeros(16, device="meta"), "_rebuild_meta_tensor"),
    "beyond float32": ("bn1.bias", lambda: torch.full((16,), 1e300, dtype=torch.float64), "not finite in float32"),
    "negative variances": ("bn1.running_var", lambda: -torch.ones(16), "negative values"),
    "5000 digits": (f"layer1.{'9' * 5000}.conv1.weight", lambda: torch.zeros(1), "unknown are layer1.9999"),
    "a name of two lines": ("layer\n1", lambda: torch.zeros(1), r"unknown are 'layer\\n1'"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weight_is_refused(kind: str, tmp_path: Path) -> None:
    name, value, words = NO_WEIGHTS[kind]
    torch.save({**weights(), name: value()}, tmp_path / "net.pth")
    refused(tmp_path / "net.pth", words)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_safetensors_of_other_numbers_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({**weights(), "bn1.bias": torch.zeros(16).to(dtype)}, tmp_path / "net.safetensors")
    refused(tmp_path / "net.safetensors", "weights are float16")


@pytest.mark.parametrize("name", ["resnet18", "regnet_x_400mf"])
@pytest.mark.parametrize(
    ("shape", "words"),
    [((2**40, 0), "classes; 1 to 100,000"), ((100_000, 0), "of another shape are fc.weight"), ((), "no fc.weight")],
)
def test_a_head_of_any_size_is_refused_before_memory_is_taken(
    name: str, shape: tuple[int, ...], words: str, tmp_path: Path
) -> None:
    state = torchvision.models.get_model(name, weights=None, num_classes=2).state_dict()
    torch.save({**state, "fc.weight": torch.zeros(shape)}, tmp_path / "net.pth")
    refused(tmp_path / "net.pth", words, f"torchvision:{name}")


def shared_tuples(levels: int) -> bytes:
    """Returns operations that make a tuple of 2^levels parts, each level naming the one below twice."""
    return b")q\0" + b"".join(b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(levels))


# Pickles by their operations: } is a new dictionary, K\x01 the number 1, s sets an item, R calls.
OPERATIONS: dict[str, tuple[bytes, str]] = {
    "a key whose hash takes 2^60 steps": (b"}" + shared_tuples(60) + b"K\x01s.", "nested too deeply"),
    "a key of a million levels": (b"})" + b"\x85" * 900_000 + b"K\x01s.", "nested too deeply"),
    "a persistent name of 2^60 parts": (shared_tuples(60) + b"Q.", "nested too deeply"),
    "a set made again and again": (
        b"](" + b"N" * 9999 + b"eq\0c__builtin__\nset\nq\1" + b"h\1h\0\x85R0" * 20_000 + b".",
        "named too often",
    ),
    "2^40 bytes": (b"c__builtin__\nbytearray\n\x8a\6\0\0\0\0\0\1\x85R.", "would call builtins.bytearray"),
    "a tensor of any size": (b"ctorch\nFloatTensor\n\x8a\6\0\0\0\0\0\1\x85R.", "would call torch.FloatTensor"),
    "many operations": (b"N" * 5001 + b".", "more than 5,000 operations"),
    "an object that is not there": (b"h\7.", "is damaged"),
    "an empty stack": (b"0.", "is damaged"),
    "no end": (b"}", "is damaged"),
}


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_a_pickle_is_measured_before_it_is_loaded(
    kind: str, archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "many operations":
        monkeypatch.setattr("macer_serve.checkpoint.pickles.MAX_OPERATIONS", 5000)
    operations, words = OPERATIONS[kind]
    file = tmp_path / "net.pth"
    if archive:
        with zipfile.ZipFile(file, "w") as written:
            written.writestr("net/data.pkl", b"\x80\2" + operations)
            written.writestr("net/version", "3")
    else:
        file.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\2" + operations)
    refused(file, words)


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    """Two readers would take one each."""
    with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps({}, 2))
        archive.writestr("net/DATA.pkl", pickle.dumps({}, 2))
    refused(tmp_path / "net.pth", "share a name")


@pytest.mark.parametrize("versions", [5, {"": 5, 3: {}, "fc": {"version": "x"}}])
def test_what_is_odd_beside_the_weights_does_no_harm(versions: Any, tmp_path: Path) -> None:
    """Layers have versions in `_metadata`; an `arch` that is no text says nothing."""
    state = OrderedDict(weights())
    state._metadata = versions  # type: ignore[attr-defined]
    beside = {"betas": [(0.9, 0.99)] * 3, "milestones": Counter([3, 5]), "type": torch.float32, "seen": {1, 2}}
    torch.save({"arch": torch.zeros(3), **beside, "state_dict": state}, tmp_path / "net.pth")
    assert import_model(tmp_path / "net.pth", tmp_path / "out", FACTS).architecture == "resnet20"


def test_an_endless_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "net.pth").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="is larger than"):
        read_bytes(tmp_path / "net.pth", 2**20)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_bytes(Path("/dev/zero"))


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.onnx", "is not a file")
    refused(tmp_path / f"{'x' * 5000}.onnx", "is not a file")
    (tmp_path / "net.h5").write_bytes(b"")
    refused(tmp_path / "net.h5", r"cannot be imported: an \.onnx file can")
