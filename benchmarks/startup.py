"""Claim: `serve run deployments/smoothed.yaml` is ready within 12 s of its start, with empty compiler caches.

    python benchmarks/startup.py [--rounds 3] [--engine auto torch]

Each start has caches of its own (torch's Inductor and Triton), empty, in alternating rounds over the engines. Ready is
the first 200 of /readyz, which asks the voter. The port must be free. Files that were read before stay in memory:
the first start after a reboot takes longer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from engine import machine
from latency import ROOT, ask, wait_until_ready


def wait_for_the_port(limit_s: float = 30) -> None:
    """Returns when nothing listens where the server will: Serve would share its port with another server."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", 8000))
                return
        time.sleep(0.5)
    raise SystemExit("port 8000 is taken: end the server that listens there")


def start(engine: str) -> tuple[float, float]:
    """Returns the seconds until a server with empty caches is ready, and those of its first answer."""
    wait_for_the_port()
    with tempfile.TemporaryDirectory() as folder:
        config = yaml.safe_load((ROOT / "deployments" / "smoothed.yaml").read_text())
        for model in config["applications"][0]["args"]["models"].values():
            model["voter"] = {"engine": engine}
        path = Path(folder, "smoothed.yaml")
        path.write_text(yaml.safe_dump(config))
        caches = {name: str(Path(folder, name)) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        began = time.monotonic()
        server = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(path)],
            cwd=ROOT,
            env={**os.environ, **caches},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until_ready(300)
            ready = time.monotonic() - began
            first, _ = ask(next((ROOT / "tests" / "images").glob("*ship.png")).read_bytes())
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
        return ready, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", nargs="+", default=["auto", "torch"])
    options = parser.parse_args()
    print(machine())
    found: dict[str, list[float]] = {engine: [] for engine in options.engine}
    for _ in range(options.rounds):
        for engine in options.engine:
            ready, first = start(engine)
            found[engine].append(ready)
            print(f"{engine:8} ready after {ready:5.1f} s, first answer {first:5.2f} s", flush=True)
    for engine, times in found.items():
        print(f"{engine:8} median {statistics.median(times):5.1f} s of {len(times)} starts")


if __name__ == "__main__":
    main()
