"""The server's model in a process of its own: the bare engine's rate, and the certificates that answers must equal.

    python benchmarks/offline.py FILE.yaml MODEL   # a JSON command per line of standard input, a JSON result per line

It opens the voter with the options of the server's YAML and reads the server's key file, so that its certificates are
those of the server, bit by bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from own_server import IMAGES, Server, described

from macer_serve.issuing import Issuer
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.votes import Draw
from macer_serve.verification import read_document, verify
from macer_serve.voters import Task, drive


class Offline:
    """Certificates of a server's model without the server; seconds are those of this process."""

    def __init__(self, server: Server) -> None:
        self.settings = server.settings
        self.issuer = Issuer.load(server.key_file)
        loaded = SmoothedClassifier.load(
            self.settings.checkpoint, noise=self.settings.noise, options=self.settings.voter
        )
        config = replace(loaded.config, name=server.model)
        self.classifier = SmoothedClassifier(config, voter=loaded.voter, noise=self.settings.noise, issuer=self.issuer)

    def certify(self, image: str, **parameters: Any) -> dict[str, Any]:
        """Returns the certificate of an image file, its JWS, and the seconds from upload to signature."""
        data, classifier = Path(image).read_bytes(), self.classifier
        began = time.perf_counter()
        plan, cap = self.settings.asked(**parameters)
        model_input = classifier.model_input(data)
        run, proof = classifier.certification(model_input, plan, cap=cap), classifier.seed_proof(model_input, plan)
        assert classifier.voter is not None
        drive(run, model_input.x, proof.seed, classifier.voter)
        certificate = classifier.certificate(model_input, run, proof, classifier.voter.engine)
        jws = classifier.signed(certificate)
        seconds = time.perf_counter() - began
        return {"certificate": certificate.to_json(), "jws": jws, "seconds": seconds}

    def recount(self, image: str, answer: dict[str, Any]) -> dict[str, Any]:
        """Returns whether the votes of an answer that ended at its deadline are those of its noisy copies."""
        found = verify(
            read_document(json.dumps(answer).encode()),
            Path(image).read_bytes(),
            self.classifier.config,
            keys=self.issuer.keys,
            voter=lambda noise: self.classifier.voter,  # type: ignore[arg-type, return-value]
        )
        return {"verdict": found.verdict.name, "failed": [str(finding) for finding in found.failed]}

    def rate(self, seconds: float) -> dict[str, float]:
        """Returns the votes per second of the bare engine, with two passes per worker in flight."""
        voter = self.classifier.voter
        assert voter is not None
        x = self.classifier.model_input(IMAGES[0].read_bytes()).x
        batch, counted, at = voter.batch_sizes[-1], 0, 0
        waiting: deque[Any] = deque()
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            while len(waiting) < 2 * voter.workers:
                waiting.append(voter.submit([Task(x, bytes(16), Draw("estimation", at, at + batch))]))
                at += batch
            counted += int(waiting.popleft().result()[0].sum())
        while waiting:
            counted += int(waiting.popleft().result()[0].sum())
        return {"rate": counted / (time.perf_counter() - began)}


class OfflineProcess:
    """An `Offline` in a child process, which computes only while it is asked."""

    def __init__(self, server: Server) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(server.file), server.model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # who waits for a turn must not spin
        )
        self._answer()  # it is ready

    def ask(self, method: str, *arguments: Any, **parameters: Any) -> Any:
        """Returns what the method of `Offline` returns."""
        assert self._process.stdin is not None
        print(json.dumps([method, arguments, parameters]), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit("the offline process has ended: its error stands above")
        return json.loads(line)

    def __enter__(self) -> OfflineProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Answers commands until standard input ends."""
    offline = Offline(described(Path(sys.argv[1]), sys.argv[2]))
    offline.rate(0.5)
    print("{}", flush=True)
    for line in sys.stdin:
        method, arguments, parameters = json.loads(line)
        print(json.dumps(getattr(offline, method)(*arguments, **parameters)), flush=True)


if __name__ == "__main__":
    main()
