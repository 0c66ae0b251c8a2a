"""What may come back from a server under faults: each answer is compared with the one computed offline."""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from faults import Faults
from load import REFUSED, quantiles

PROBLEM = "application/problem+json"
INGRESS_S = 20.0  # after the end of an ingress, requests may fail

Event = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sent:
    """A request: what the client did (`action`), in words, its plan and image, and when (monotonic clock)."""

    action: str
    name: str
    plan: str
    image: Path
    at: float


@dataclass(frozen=True, slots=True)
class Received:
    """The response to a request: status, content type, Retry-After and body."""

    status: int
    kind: str
    retry_after: str | None
    text: str

    @property
    def retry_s(self) -> float:
        """Seconds of Retry-After, 0 if it holds no whole number."""
        return float(self.retry_after) if self.retry_after and self.retry_after.isdigit() else 0.0


def events_of(text: str) -> list[Event]:
    """Returns the complete events of a stream."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


class Judge:
    """Counts what came back, by action, and notes what should not have."""

    def __init__(self, expected: dict[tuple[str, Path], dict[str, Any]], faults: Faults) -> None:
        self._expected, self._faults = expected, faults
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.wrong: list[str] = []
        self.cut_short: list[tuple[Path, dict[str, Any]]] = []
        self.latencies: dict[str, list[float]] = defaultdict(list)  # seconds, by plan
        self._admitted: dict[str, list[float]] = defaultdict(list)  # when requests were sent that were answered
        self._refused: list[tuple[str, float, float]] = []  # plan, when, Retry-After

    def count(self, sent: Sent, outcome: str, fault: str | None = None) -> None:
        """Counts an outcome, and the fault in it."""
        self.outcomes[sent.action][outcome] += 1
        if fault is not None:
            self.wrong.append(f"{time.strftime('%H:%M:%S')} {sent.name}, {sent.plan} of {sent.image.name}: {fault}")

    def no_answer(self, sent: Sent, error: Exception) -> None:
        """Counts a connection that broke."""
        broken = sent.action == "stream" and self._ingress_is_lost(sent)
        self.count(sent, "broken stream" if broken else "no answer", None if broken else repr(error))

    def judge(self, sent: Sent, received: Received) -> float:
        """Counts a response; returns the seconds for which the client must wait."""
        if received.status == 200 and sent.action != "hostile":
            if sent.action == "stream":
                self._stream(sent, received.text)
            else:
                self._answer(sent, json.loads(received.text))
            return 0.0
        status, pause = received.status, received.retry_s
        fault = None if received.kind == PROBLEM else f"{status} as {received.kind}: {received.text[:100]!r}"
        if status in REFUSED:
            if pause < 1:
                fault = fault or f"{status} with Retry-After {received.retry_after}"
            else:
                self._refused.append((sent.plan, sent.at, pause))
        elif status == 500 and self._ingress_is_lost(sent):
            pause = 1.0
        elif sent.action != "hostile" or not 400 <= status < 500:
            fault = fault or f"{status}: {received.text[:200]}"
        self.count(sent, str(status), fault)
        return pause

    def _answer(self, sent: Sent, answer: dict[str, Any]) -> None:
        certificate = answer["certificate"]
        self._admitted[sent.plan].append(sent.at)
        self.latencies[sent.plan].append(time.monotonic() - sent.at)
        if answer["stopped"] == "deadline":
            self.cut_short.append((sent.image, answer))
            self.count(sent, "200 at the deadline")
            return
        expected = self._expected[sent.plan, sent.image]
        fault = None
        if certificate != expected["certificate"] or answer["certificate_jws"] != expected["jws"]:
            others = [name for name, value in certificate.items() if value != expected["certificate"].get(name)]
            fault = f"another answer than offline in {', '.join(others) or 'the JWS'}"
        elif any(answer[name] != certificate[name] for name in ("label", "radius", "abstained", "stopped")):
            fault = "the answer says something else than its certificate"
        self.count(sent, "200", fault)

    def _stream(self, sent: Sent, text: str) -> None:
        events = events_of(text)
        states, (name, last) = [state for event, state in events if event == "progress"], (events or [("", {})])[-1]
        if any(a["n"] > b["n"] or a["radius"] > b["radius"] for a, b in pairwise(states)):
            self.wrong.append(f"stream {sent.plan} of {sent.image.name}: progress goes back")
        lost = self._ingress_is_lost(sent)
        if name == "result":
            self._answer(sent, last)
        elif name == "error":
            foreseen = last["status"] in REFUSED or (last["status"] == 500 and lost)
            self.count(sent, f"error {last['status']}", None if foreseen else str(last))
        else:
            self.count(sent, "broken stream", None if lost else f"it ends without a result: {text[-100:]!r}")

    def _ingress_is_lost(self, sent: Sent) -> bool:
        """Returns whether the ingress was killed while the request was in flight, or shortly before."""
        return any(sent.at - INGRESS_S <= at <= time.monotonic() for at in self._faults.ingress)

    def chosen(self, most: int) -> list[tuple[Path, dict[str, Any]]]:
        """Returns answers that were cut short, to be counted again."""
        return random.Random(0).sample(self.cut_short, min(most, len(self.cut_short)))

    def promises(self) -> str:
        """Returns how often Retry-After was within a factor of 2 of the time to the next request that was admitted."""
        ratios = []
        for plan, at, said in self._refused:
            if later := [admitted - at for admitted in self._admitted[plan] if admitted > at]:
                ratios.append(said / max(1.0, min(later)))
        if not ratios:
            return f"{len(self._refused)} refusals with Retry-After, none of which can be compared"
        p50, p95, _ = quantiles(ratios, 1.0)
        right = sum(0.5 <= ratio <= 2 for ratio in ratios)
        return (
            f"{len(self._refused)} refusals; Retry-After over the time to the plan's next admission (at least 1 s): "
            f"p50 {p50:.2f}, p95 {p95:.2f}; within a factor of 2: {right} of {len(ratios)}"
        )
