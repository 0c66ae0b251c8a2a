"""Copies by digest: what is served stays the same when the folder that it came from does not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from macer_serve.checkpoint import CheckpointConfig, load_config, write_checkpoint
from macer_serve.checkpoint.pinned import KEPT_S, cache_folder, pin, pinned, remove_unused
from macer_serve.errors import CheckpointError, OutputError

CONFIG = CheckpointConfig(
    name="x", architecture="onnx", classes=("a", "b"), input_shape=(3, 4, 4), mean=(0.0,) * 3, std=(1.0,) * 3,
    sigma=0.25, resize=4, files={"model.onnx": "sha256:" + 64 * "0"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def write(folder: Path, content: bytes) -> CheckpointConfig:
    return write_checkpoint(CONFIG, {"model.onnx": content}, folder)


def test_what_was_pinned_is_loaded_after_the_folder_was_overwritten_or_removed(tmp_path: Path) -> None:
    first = write(tmp_path / "model", b"first")
    assert pin(tmp_path / "model") == first
    second = write(tmp_path / "model", b"second")
    copy = pinned(first.digest, tmp_path / "model")
    assert load_config(copy) == first
    assert (copy / "model.onnx").read_bytes() == b"first"
    assert pin(tmp_path / "nowhere", first.digest) == first
    assert pin(tmp_path / "model") == second


def test_files_that_are_written_into_the_folder_do_not_reach_the_copy(tmp_path: Path) -> None:
    config = write(tmp_path / "model", b"first")
    copy = pinned(config.digest, tmp_path / "model")
    with (tmp_path / "model" / "model.onnx").open("r+b") as file:
        file.write(b"other")
    assert (copy / "model.onnx").read_bytes() == b"first"
    assert not (copy / "model.onnx").stat().st_mode & 0o222
    with pytest.raises(CheckpointError, match="is not the file this checkpoint was saved with"):
        pin(tmp_path / "model")


def test_a_machine_without_a_copy_names_both_digests(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", b"first"), write(tmp_path / "model", b"second")
    with pytest.raises(CheckpointError) as refused:
        pinned(first.digest, tmp_path / "model")
    assert first.digest in str(refused.value)
    assert second.digest in str(refused.value)


def cut(copy: Path) -> None:
    (copy / "model.onnx").chmod(0o644)
    (copy / "model.onnx").write_bytes(b"fir")


def emptied(copy: Path) -> None:
    (copy / "model.onnx").unlink()


def claims_more(copy: Path) -> None:
    (copy / "config.json").chmod(0o644)
    (copy / "config.json").write_text(json.dumps(dataclasses.replace(load_config(copy), sigma=0.5).to_json()))


@pytest.mark.parametrize("damage", [cut, emptied, claims_more])
def test_a_damaged_copy_is_made_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    config = write(tmp_path / "model", b"first")
    damage(pinned(config.digest, tmp_path / "model"))
    copy = pinned(config.digest, tmp_path / "model")
    assert load_config(copy) == config
    assert (copy / "model.onnx").read_bytes() == b"first"


def test_many_who_pin_at_once_find_one_whole_copy(tmp_path: Path, cache: Path) -> None:
    config = write(tmp_path / "model", bytes(10**6))
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: pin(tmp_path / "model").digest, range(16))) == {config.digest}
    (copy,) = cache.iterdir()
    assert copy.name == config.digest.removeprefix("sha256:")


def test_only_what_no_process_holds_and_nobody_asked_for_is_removed(tmp_path: Path, cache: Path) -> None:
    held, free = write(tmp_path / "held", b"held"), write(tmp_path / "free", b"free")
    pin(tmp_path / "free")
    source = "import sys\nfrom macer_serve.checkpoint.pinned import pinned\nprint(pinned(*sys.argv[1:]), flush=True)\n"
    command = [sys.executable, "-c", source + "input()", held.digest, str(tmp_path / "held")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        copy = Path(process.stdout.readline().strip())
        assert remove_unused(KEPT_S) == []
        assert remove_unused(0.0) == [cache / free.digest.removeprefix("sha256:")]
        assert list(cache.iterdir()) == [copy]
        process.communicate("\n")
    assert remove_unused(0.0) == [copy]
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write(tmp_path / "model", b"first")
    with pytest.raises(OutputError, match="set XDG_CACHE_HOME to a folder that can be written"):
        pin(tmp_path / "model")
