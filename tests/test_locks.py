"""One process writes at a time, and the other is told which."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path

import pytest

from macer_serve.errors import LogError
from macer_serve.evaluation.logs import LogWriter
from macer_serve.locks import HeldError, lock, lock_folder, unlock_folder

HOLD = """
import sys, time
from pathlib import Path
from macer_serve.locks import lock_folder
file = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
{then}
time.sleep(100)
"""


def holder(folder: Path, then: str = "") -> subprocess.Popen[str]:
    """A process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_held_by_one_process_and_the_other_is_told_which(tmp_path: Path) -> None:
    other = holder(tmp_path / "run")
    try:
        with pytest.raises(HeldError, match=rf"process {other.pid} on \S+, since 20\d\d-.*: -c "):
            lock_folder(tmp_path / "run")
    finally:
        other.kill()
        other.wait()
    file = lock_folder(tmp_path / "run")
    assert f"process {os.getpid()} on" in (tmp_path / "run" / "lock").read_text(), "a killed process holds nothing"
    unlock_folder(tmp_path / "run", file)
    assert not (tmp_path / "run").exists(), "a folder that was made for the lock goes with it"


def test_a_folder_with_files_stays(tmp_path: Path) -> None:
    file = lock_folder(tmp_path)
    (tmp_path / "state").write_text("")
    with pytest.raises(HeldError, match=f"process {os.getpid()}"):
        lock_folder(tmp_path)
    unlock_folder(tmp_path, file)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_children_of_a_killed_process_hold_nothing(tmp_path: Path) -> None:
    """Decoding processes outlive a trainer that was killed by some seconds."""
    fork = "import os\nchild = os.fork()\nif child: print(child, flush=True)"
    other = holder(tmp_path / "run", then=fork)
    assert other.stdout is not None
    child = int(other.stdout.readline())
    other.send_signal(signal.SIGKILL)
    other.wait()
    try:
        os.kill(child, 0)
        unlock_folder(tmp_path / "run", lock_folder(tmp_path / "run"))
    finally:
        os.kill(child, signal.SIGKILL)


def test_of_many_that_start_together_one_holds_the_folder_at_a_time(tmp_path: Path) -> None:
    """Each takes the folder, looks that nobody else is there, and lets it go, which removes it."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom macer_serve.locks import *\n"
        "folder, inside, taken = Path(sys.argv[1]), Path(sys.argv[1] + '.inside'), 0\n"
        "for _ in range(400):\n"
        "    try: file = lock_folder(folder)\n"
        "    except HeldError: continue\n"
        "    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))\n"
        "    inside.unlink()\n    unlock_folder(folder, file)\n    taken += 1\n"
        "assert taken, 'never'"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux names the holder of a lock")
def test_a_log_is_written_by_one_process_and_the_other_is_told_which(tmp_path: Path) -> None:
    log = tmp_path / "log.tsv"
    code = (
        "import sys, time\nfrom macer_serve.evaluation.logs import LogWriter\n"
        "log = LogWriter.open(sys.argv[1], {'n': '1'})\nprint('held', flush=True)\ntime.sleep(100)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(log)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = log.read_bytes()
        with pytest.raises(LogError, match=rf"log.tsv is being written by (process {other.pid}|another process);"):
            LogWriter.open(log, {"n": "1"})
        assert log.read_bytes() == before
    finally:
        other.kill()
        other.wait()


def test_a_closed_file_is_free(tmp_path: Path) -> None:
    for _ in range(2):
        with FileIO(tmp_path / "file", "a+") as file:
            lock(file)
            with FileIO(tmp_path / "file", "a+") as second, pytest.raises(HeldError):
                lock(second)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    with pytest.raises(OSError, match="file"):
        lock_folder(tmp_path / "file" / "run")
    assert time.monotonic() - began < 30, "it does not try for ever"
