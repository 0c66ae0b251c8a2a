"""`macer certify` writes the same rows however it is run: by one process, by workers, by workers that are killed.

Four logs of the same images: one process; workers; workers of which one is killed (SIGKILL) every so many seconds;
workers whose run is killed as a whole halfway, and continued. Prints the seconds of each and the SHA-256 of its rows
without their times, and ends with an error if any two differ.

    python benchmarks/certify_workers.py --data-dir DATA --every 125 --n 10000 --kill-every 30
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def start(out: Path, options: argparse.Namespace, workers: int | None) -> subprocess.Popen[bytes]:
    """Starts `macer certify` in a process of its own."""
    command = [str(Path(sys.executable).with_name("macer")), "certify", options.checkpoint]
    command += ["--dataset", options.dataset, "--data-dir", str(options.data_dir), "--out", str(out)]
    command += ["--every", str(options.every), "--n", str(options.n)]
    return subprocess.Popen([*command, *(["--workers", str(workers)] if workers else [])], stderr=subprocess.DEVNULL)


def rows(log: Path) -> list[str]:
    """Returns the complete lines of a log without their times."""
    if not log.exists():
        return []
    lines = [line.split("\t") for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    at = lines[0].index("time") if lines else 0
    return ["\t".join(cells[:at] + cells[at + 1 :]) for cells in lines]


def workers_of(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Returns the processes of the run's workers."""
    found = []
    for child in psutil.Process(run.pid).children(recursive=True):
        try:
            if child.name().startswith("ray::Worker") or "ray::Worker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def finished(run: subprocess.Popen[bytes]) -> None:
    if run.wait():
        sys.exit(f"macer certify ended with {run.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="bundled:cifar10")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--every", type=int, default=125)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds")
    options = parser.parse_args()
    dice, digests = random.Random(0), set()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("one process", "workers", "workers, killed", "workers, interrupted"):
            out, began, events = Path(folder) / f"{name}.tsv", time.monotonic(), 0
            run = start(out, options, None if name == "one process" else options.workers)
            if name == "workers, killed":
                last = time.monotonic()
                while run.poll() is None:
                    time.sleep(0.2)
                    if time.monotonic() - last >= options.kill_every and (found := workers_of(run)):
                        dice.choice(found).kill()
                        last, events = time.monotonic(), events + 1
            if name == "workers, interrupted":
                half = (len(rows(Path(folder) / "one process.tsv")) - 1) // 2
                while len(rows(out)) - 1 < half and run.poll() is None:
                    time.sleep(0.1)
                run.send_signal(signal.SIGKILL)
                run.wait()
                events = 1
                run = start(out, options, options.workers)
            finished(run)
            text = rows(out)
            digest = hashlib.sha256("".join(text).encode()).hexdigest()
            digests.add(digest)
            what = f"{len(text) - 1} rows, {time.monotonic() - began:6.1f} s, {events} kills, sha256 {digest[:16]}"
            print(f"{name:21} {what}", flush=True)
    if len(digests) > 1:
        sys.exit("the rows differ")


if __name__ == "__main__":
    main()
