"""One writer per output: a second one is told who the first is, and a dead one holds nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from macer_serve.errors import OutputError
from macer_serve.locks import locked

HOLD = """
import sys
from macer_serve.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    input()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until it reads a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    with holder(out) as process:
        words = (
            rf"mine is being written by process {process.pid} on {re.escape(socket.gethostname())} since 20.* UTC: wait"
        )
        with pytest.raises(OutputError, match=words), locked(out):
            pass
        process.communicate("\n")
    with locked(out):
        pass
    assert list(out.parent.iterdir()) == []


def test_a_killed_writer_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path / "mine") as process:
        os.kill(process.pid, signal.SIGKILL)
    assert (tmp_path / ".mine.lock").exists()
    with locked(tmp_path / "mine"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_neither_holds_nor_ends_the_lock_of_its_parent(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from macer_serve.errors import OutputError
from macer_serve.locks import locked
with locked(sys.argv[1]):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        try:
            with locked(sys.argv[1]):
                print("both")
        except OutputError:
            print("held", flush=True)
        if os.fork():
            os.kill(os.getpid(), signal.SIGKILL)
        print("child", flush=True)
        input()
os._exit(0)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "mine")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["held\n", "child\n"]
        assert process.wait(30) == -signal.SIGKILL
        with locked(tmp_path / "mine"):  # the second child still runs
            pass
        assert process.stdin is not None
        process.stdin.write("\n")


def test_a_thread_or_a_nested_call_of_one_process_is_a_second_writer_too(tmp_path: Path) -> None:
    with locked(tmp_path / "mine"):
        with pytest.raises(OutputError, match=f"process {os.getpid()} "), locked(tmp_path / "mine"):
            pass
        with locked(tmp_path / "other"):
            pass


def test_the_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "mine"):
        raise ZeroDivisionError
    with locked(tmp_path / "mine"):
        pass


def test_a_symbolic_link_and_its_target_are_one_output(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "mine")
    held, words = locked(tmp_path / "mine"), "link is being written by process"
    with held, pytest.raises(OutputError, match=words), locked(tmp_path / "elsewhere" / "link"):
        pass


def test_a_place_that_cannot_be_written_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="mine cannot be written: "), locked(tmp_path / "file" / "mine"):
        pass


def test_of_many_writers_one_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    """Writers that come and go while the lock file is removed and made anew never meet."""
    code = """
import os, sys
from macer_serve.errors import OutputError
from macer_serve.locks import locked
out, done = sys.argv[1], 0
while done < 200:
    try:
        with locked(out):
            os.close(os.open(out + ".inside", os.O_CREAT | os.O_EXCL))  # fails if another is inside
            os.unlink(out + ".inside")
        done += 1
    except OutputError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "mine")]) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []
