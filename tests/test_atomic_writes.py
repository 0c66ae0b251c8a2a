"""Files and folders appear whole or not at all, behind symbolic links too."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from macer_serve.atomic_writes import atomic_file, atomic_folder
from macer_serve.errors import OutputError

Write = Callable[[Path, bytes], None]


def write_file(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def write_folder(path: Path, data: bytes) -> None:
    with atomic_folder(path) as staging:
        (staging / "file").write_bytes(data)


def content(path: Path) -> bytes:
    return (path / "file" if path.is_dir() else path).read_bytes()


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])


@WRITERS
def test_an_output_is_made_then_replaced_and_nothing_is_left_beside_it(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for data in (b"first", b"second"):
        write(out, data)
        assert content(out) == data
        assert os.listdir(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == (0o755 if out.is_dir() else 0o644)


@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_what_was_there(context: Any, error: BaseException, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (write_file if context is atomic_file else write_folder)(out, b"before")

    def half_written() -> None:
        with context(out) as staging:
            if context is atomic_file:
                staging.write(b"half")
            else:
                (staging / "file").write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        half_written()
    assert content(out) == b"before"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
def test_no_room_is_a_sentence(context: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out cannot be written: No space left on device"), context(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


@WRITERS
def test_the_target_of_a_symbolic_link_is_replaced_and_the_link_stays(write: Write, tmp_path: Path) -> None:
    target, link = tmp_path / "models" / "v1", tmp_path / "current"
    write(target, b"before")
    link.symlink_to(target)
    write(link, b"after")
    assert link.is_symlink()
    assert content(target) == content(link) == b"after"
    assert sorted(os.listdir(tmp_path)) == ["current", "models"]
    assert os.listdir(tmp_path / "models") == ["v1"]


@WRITERS
def test_a_dangling_link_and_a_circle_of_links_are_refused(write: Write, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match=r"link is a symbolic link to .*gone, which does not exist: remove the link"):
        write(link, b"")
    assert link.is_symlink()
    (tmp_path / "gone").symlink_to(link)
    with pytest.raises(OutputError, match="link"):
        write(link, b"")
    assert sorted(os.listdir(tmp_path)) == ["gone", "link"]


def test_a_file_in_place_of_a_folder_and_the_reverse_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_bytes(b"years of work")
    with pytest.raises(OutputError, match="thesis is a file, not a folder: choose another output"):
        write_folder(tmp_path / "thesis", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder cannot be written: Is a directory"):
        write_file(tmp_path / "folder", b"")
    with pytest.raises(OutputError, match="cannot be written: "):
        write_folder(tmp_path / "thesis" / "below", b"")
    assert content(tmp_path / "thesis") == b"years of work"
    assert sorted(os.listdir(tmp_path)) == ["folder", "thesis"]


@pytest.fixture
def of_another_user() -> Iterator[Path]:
    """A folder in which this process, for the time of the test, has no right to write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder / "out", b"before")
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


@WRITERS
def test_a_folder_without_the_right_to_write_gets_a_sentence(write: Write, of_another_user: Path) -> None:
    for out in (of_another_user / "out", of_another_user / "new"):
        with pytest.raises(OutputError, match=r"(out|new) cannot be written: Permission denied"):
            write(out, b"after")
    assert content(of_another_user / "out") == b"before"
    assert os.listdir(of_another_user) == ["out"]
