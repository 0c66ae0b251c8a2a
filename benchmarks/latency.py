"""Claim: a CIFAR-10 test image is answered in under 3 s, and the server is ready within 60 s.

With deployments/smoothed.yaml as it is (10,000 votes at most) and the bundled checkpoint; the median of 20 requests,
one at a time, on two cores.

    python benchmarks/latency.py            # starts `serve run deployments/smoothed.yaml`, measures, stops it
    python benchmarks/latency.py --running  # measures the server that runs already

Each request carries another image or repeats one; nothing is cached between them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
URL = "http://127.0.0.1:8000"


def wait_until_ready(limit_s: float) -> None:
    """Returns when /readyz answers 200; raises SystemExit after `limit_s`."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        try:
            with urllib.request.urlopen(f"{URL}/readyz", timeout=5) as response:
                if response.status == 200 and json.load(response)["status"] == "ready":
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError, json.JSONDecodeError):
            time.sleep(0.2)
    raise SystemExit(f"the server is not ready after {limit_s:.0f} s")


def ask(image: bytes) -> tuple[float, dict[str, object]]:
    """Seconds to the answer, and the answer."""
    request = urllib.request.Request(f"{URL}/predict", data=image, headers={"Content-Type": "image/png"})
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return time.perf_counter() - began, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", action="store_true", help="use the server that runs already")
    parser.add_argument("--requests", type=int, default=20)
    options = parser.parse_args()
    server = None
    try:
        if not options.running:
            began = time.monotonic()
            server = subprocess.Popen(
                ["serve", "run", "deployments/smoothed.yaml"],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            wait_until_ready(300)
            print(f"ready after {time.monotonic() - began:.1f} s")
        images = sorted((ROOT / "tests" / "images").glob("*.png"))
        seconds = []
        for i in range(options.requests):
            path = images[i % len(images)]
            elapsed, answer = ask(path.read_bytes())
            seconds.append(elapsed)
            print(f"{path.name:24} {elapsed:6.3f} s  {answer['label']}  {answer['radius']}")
        median = statistics.median(seconds)
        print(f"median {median:.3f} s, min {min(seconds):.3f}, max {max(seconds):.3f}, of {len(seconds)}")
    finally:
        if server is not None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    main()
