"""Claim: an answer over HTTP takes no longer than by an earlier version of this project.

    python benchmarks/two_versions.py COMMIT [--requests 60] [--out FILE]

Checks COMMIT out into a folder of its own and starts the servers of both versions (`macer serve`, or `serve run` before
that existed), each with its own deployment, checkpoint and engine, in this environment. Requests for the same number of
votes go to the two in turns, one at a time. Printed are the medians, and the median of the paired differences with a
95 % interval (Hodges-Lehmann, from the signed ranks); then what HTTP and Serve add, which is the client's time without
what the answer's `timing_ms` names. The commit must run with the packages that are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import yaml
from engine import machine
from load import Report
from own_server import IMAGES, ROOT, START_S, on_free_port, started

VOTES = (500, 1_000, 4_000)


@contextlib.contextmanager
def serving(source: Path, folder: Path) -> Iterator[str]:
    """Yields the address of a server of the package in `source`, with its shipped deployment on a free port."""
    config, file = on_free_port(source), folder / "smoothed.yaml"
    folder.mkdir()
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    address = f"http://127.0.0.1:{config['http_options']['port']}"
    if (source / "macer_serve" / "cli" / "serve.py").exists():
        code = ["from macer_serve.cli import main; main()", "serve"]
    else:
        code = ["from ray.serve.scripts import cli; cli()", "run"]
    # The niceness is that of `macer serve`.
    own = {"PYTHONPATH": str(source), "RAY_worker_niceness": "0"}
    with started([sys.executable, "-c", *code, str(file)], folder, source, **own) as process:
        deadline = time.monotonic() + START_S
        while not is_ready(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server of {source} does not start:\n{(folder / 'serve.log').read_text()}")
            time.sleep(0.5)
        yield address


def is_ready(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/readyz", timeout=30).status_code == 200
    return False


def milliseconds(client: httpx.Client, address: str, image: Path, votes: int) -> tuple[float, float]:
    """Returns how long an answer takes that rests on so many votes, and how much of that HTTP and Serve add."""
    began = time.monotonic()
    answer = client.post(
        f"{address}/predict",
        params={"tolerance": 1e-6, "n": votes},
        content=image.read_bytes(),
        headers={"content-type": "image/png"},
    )
    took = 1e3 * (time.monotonic() - began)
    if answer.status_code != 200 or answer.json()["certificate"]["n"] != votes:
        raise SystemExit(f"{address} answers {answer.status_code}: {answer.text[:500]}")
    return took, took - sum(answer.json()["timing_ms"].values())


def hodges_lehmann(differences: list[float]) -> tuple[float, float, float]:
    """Returns the median of the means of pairs of differences, and its 95 % interval."""
    x = np.array(differences)
    walsh = np.sort((x[:, None] + x[None, :])[np.triu_indices(len(x))] / 2)
    spread = 1.96 * np.sqrt(len(x) * (len(x) + 1) * (2 * len(x) + 1) / 24)
    low = max(0, int(len(walsh) / 2 - spread))
    return float(np.median(walsh)), float(walsh[low]), float(walsh[-1 - low])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--requests", type=int, default=60, help="to each version, for each number of votes")
    parser.add_argument("--out", type=Path, help="write what is printed to this file, too")
    options = parser.parse_args()
    say = Report(options.out)
    say(machine())
    # Ray's sockets lie below this folder, and the path of a socket holds 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="mb", dir="/tmp"))
    try:
        subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "-q", "--detach", folder / "old", options.commit], check=True
        )
        with (
            serving(folder / "old", folder / "a") as old,
            serving(ROOT, folder / "b") as new,
            httpx.Client(timeout=120) as client,
        ):
            for votes in VOTES:
                took: dict[str, list[tuple[float, float]]] = {old: [], new: []}
                for i in range(options.requests + 3):
                    for address in (old, new) if i % 2 else (new, old):
                        took[address].append(milliseconds(client, address, IMAGES[i % len(IMAGES)], votes))
                (before, added), (now, adds) = (zip(*took[address][3:], strict=True) for address in (old, new))
                middle, low, high = hodges_lehmann([b - a for a, b in zip(before, now, strict=True)])
                say(
                    f"{votes:6,} votes: p50 {statistics.median(before):7.1f} ms by {options.commit}, "
                    f"{statistics.median(now):7.1f} now; difference {middle:+.1f} ms ({low:+.1f} to {high:+.1f}); "
                    f"HTTP and Serve add {statistics.median(added):.1f} ms, {statistics.median(adds):.1f} now"
                )
    finally:
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder / "old"], check=False)
        shutil.rmtree(folder, ignore_errors=True)
    say.save()


if __name__ == "__main__":
    main()
