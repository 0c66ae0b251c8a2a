"""Checkpoints are data: whole, unaltered, replaced at once, and nothing in them is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brightness import SEEDS, config
from digit_checkpoints import DIGEST, Bomb, edit, lenet
from torch import nn

from macer_serve.checkpoint import CheckpointConfig, load_config, load_model, resolve, save_checkpoint
from macer_serve.errors import CheckpointError, EngineError, OutputError
from macer_serve.images import UploadLimits
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan
from macer_serve.voters import VoterOptions
from macer_serve.voters.batched import BatchedVoter


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Sequential, CheckpointConfig]:
    model, settings = lenet()
    folder = tmp_path / "digits"
    return folder, model, save_checkpoint(model, settings, folder)


def test_a_checkpoint_comes_back_whole(saved: tuple[Path, nn.Sequential, CheckpointConfig]) -> None:
    folder, model, written = saved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    read, again = load_model(folder)
    assert read == written == load_config(folder)
    assert read.digest == written.digest
    x = torch.rand(3, 1, 28, 28)
    with torch.inference_mode():
        assert torch.equal(model(x), again(x))
    assert not again.training


def test_one_flipped_bit_in_the_weights_is_refused(saved: tuple[Path, nn.Sequential, CheckpointConfig]) -> None:
    path = saved[0] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not the file this checkpoint was saved with"):
        load_model(saved[0])


def test_missing_weights_and_folders_are_named(
    saved: tuple[Path, nn.Sequential, CheckpointConfig], tmp_path: Path
) -> None:
    (saved[0] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(saved[0])
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        resolve("bundled:nothing")


@pytest.mark.parametrize("writer", [pickle.dumps, "torch"])
def test_nothing_in_a_checkpoint_is_executed(
    saved: tuple[Path, nn.Sequential, CheckpointConfig], tmp_path: Path, writer: Any
) -> None:
    """A pickle in place of the weights, its digest properly named, is refused without being opened as one."""
    folder, target = saved[0], tmp_path / "executed"
    if writer == "torch":
        torch.save({"bomb": Bomb(target)}, folder / "model.safetensors")
    else:
        (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(target)))
    digest = "sha256:" + hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, files={"model.safetensors": digest})
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_model(folder)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))  # the bomb is live
    assert target.exists()


def test_what_determines_the_claim_is_the_identity_and_nothing_else_is() -> None:
    claims: list[dict[str, Any]] = [
        {}, {"sigma": 0.5}, {"files": {"model.safetensors": DIGEST, "model.int8.onnx": DIGEST}},
        {"mean": (0.1, 0.0, 0.0)}, {"classes": ("dark", "bright", "grey")},
        {"files": {"model.safetensors": "sha256:" + 64 * "1"}}, {"resize": 5},
    ]  # fmt: skip
    assert len({config(**change).digest for change in claims}) == len(claims)
    others: list[dict[str, Any]] = [{"recipe": {"lr": 1}}, {"seed": 0}, {"name": "another"}, {"metrics": {"acr": 1}}]
    assert {config(**change).digest for change in others} == {config().digest}


def test_a_checkpoint_is_replaced_whole(
    saved: tuple[Path, nn.Sequential, CheckpointConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, first = saved
    second = save_checkpoint(model, dataclasses.replace(first, name="second"), folder)
    assert load_model(folder)[0] == second != first
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing is left behind

    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="disk full"):
        save_checkpoint(model, dataclasses.replace(first, name="third"), folder)
    monkeypatch.undo()
    assert load_model(folder)[0] == second  # the one before is still there
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failed_write_leaves_the_old_checkpoint(
    saved: tuple[Path, nn.Sequential, CheckpointConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, first = saved

    def failing(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OutputError, match="disk full"):
        save_checkpoint(model, dataclasses.replace(first, name="second"), folder)
    monkeypatch.undo()
    assert load_model(folder)[0] == first
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    model, settings = lenet()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other files"):
        save_checkpoint(model, settings, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_checkpoint_behind_a_symbolic_link_is_replaced_there_and_the_link_stays(
    saved: tuple[Path, nn.Sequential, CheckpointConfig],
) -> None:
    folder, model, first = saved
    link = folder.parent / "current"
    link.symlink_to(folder)
    second = save_checkpoint(model, dataclasses.replace(first, name="second"), link)
    assert link.is_symlink()
    assert load_config(link) == load_config(folder) == second
    assert sorted(p.name for p in folder.parent.iterdir()) == ["current", folder.name]


def test_places_that_can_hold_no_checkpoint_get_a_sentence(tmp_path: Path) -> None:
    model, settings = lenet()
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "to a file").symlink_to(tmp_path / "file")
    for name, error, words in (
        ("file", CheckpointError, "file is a file, not a folder: choose another output"),
        ("to a file", CheckpointError, "to a file is a file, not a folder: choose another output"),
        ("file/below", OutputError, "below cannot be written: "),
        ("dangling", OutputError, "dangling is a symbolic link to .*gone, which does not exist: remove the link"),
        ("circle", OutputError, "circle"),
    ):
        with pytest.raises(error, match=words):
            save_checkpoint(model, settings, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["circle", "dangling", "file", "to a file"]
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_dangling_link_is_no_checkpoint_to_load(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="dangling is not a checkpoint"):
        load_config(tmp_path / "dangling")


def test_a_loaded_checkpoint_certifies_and_repeats(saved: tuple[Path, nn.Sequential, CheckpointConfig]) -> None:
    folder = saved[0]
    options = VoterOptions(device="cpu", batch=64, workers=1, precision="fp32", compile=False)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    plan = Plan(n0=20, n=100, alpha=0.05)
    certificates = []
    for _ in range(2):
        g = SmoothedClassifier.load(folder, issuer=SEEDS, options=options)
        certificates.append(g.certify(pixels, plan))
        assert isinstance(g.voter, BatchedVoter)
        g.voter.close()
    assert certificates[0] == certificates[1]
    assert certificates[0].model["digest"] == load_config(folder).digest
    ingress = SmoothedClassifier(load_config(folder), noise="exact", issuer=SEEDS, limits=UploadLimits())
    asked = g.model_input(pixels)
    assert ingress.seed_proof(ingress.model_input(pixels), plan) == g.seed_proof(asked, plan)
    with pytest.raises(EngineError, match="no voter"):
        ingress.certify(pixels, plan)
