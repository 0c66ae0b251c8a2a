"""Sends hostile requests to a server and checks every answer: no defect, no plain text, no hang, no growth.

    python benchmarks/hostile_http.py --requests 20000 --out results/hostile-http.txt

An answer of 5xx must be 503, and 503 and 429 must say when to come back. Errors must be problem documents. Each answer
comes within `LIMIT_S` seconds; only what is no HTTP may have its connection closed without one. The memory of proxy and
ingress does not grow after the first third of the requests. The requests are those of `hostile_requests.py`, and those
that schemathesis makes of the server's OpenAPI document. The exit code is 1 if any check fails; each failure is printed
with the request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import own_server
from hostile_requests import KINDS, corpus

LIMIT_S = 20.0  # for the answer; the slowest that is right is that to an upload which never comes whole
GROWTH_MIB = 64.0  # of resident memory that a heap may grow by without a leak
BROKEN = "broken HTTP"  # the kind whose connections may be closed without an answer
SCHEMA_SHARE = 0.15  # of the requests
SHOWN = 10  # failures that are printed

PROBLEM = "application/problem+json"


@dataclass(slots=True)
class Tally:
    """What was asked and answered."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)  # what 429 and 503 said
    slowest_s: float = 0.0

    def add(self, kind: str, status: int, seconds: float, body: bytes, fault: str | None, message: bytes) -> None:
        if not status and fault is None and kind != BROKEN:
            fault = "closed without an answer"
        if status in (429, 503) and fault is None and body:
            self.refusals[f"{status}: {json.loads(body)['detail']}"] += 1
        self.statuses.setdefault(kind, Counter())[status] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        if fault:
            self.failures.append(f"{kind}: {fault}\n    asked: {message[:600]!r}")

    @property
    def requests(self) -> int:
        return sum(counts.total() for counts in self.statuses.values())


def fault_of(status: int, headers: dict[str, str], body: bytes) -> str | None:
    """Returns what is wrong with an answer; None if nothing is."""
    if status < 400:
        return None
    if status >= 500 and status != 503:
        return f"status {status}: {body[:300]!r}"
    if status in (429, 503) and not headers.get("retry-after", "").isdigit():
        return f"status {status} without Retry-After"
    if headers.get("content-type") != PROBLEM:
        return f"status {status} as {headers.get('content-type')}: {body[:300]!r}"
    if body:  # HEAD has none
        try:
            document = json.loads(body)
        except ValueError:
            return f"status {status}: a problem document that is no JSON: {body[:300]!r}"
        if document.get("status") != status or not document.get("detail"):
            return f"status {status}: {document}"
    return None


def ask(address: tuple[str, int], message: bytes) -> tuple[int, float, bytes, str | None]:
    """Returns the status, the seconds, the body and the fault of what is answered; status 0: it was hung up."""
    began, answer = time.monotonic(), b""
    came = began
    try:
        with socket.create_connection(address, timeout=LIMIT_S) as connection:
            with contextlib.suppress(ConnectionError, TimeoutError):  # refused before it was whole: there is an answer
                connection.sendall(message)
            while (left := LIMIT_S - (time.monotonic() - began)) > 0:
                connection.settimeout(left)
                if not (piece := connection.recv(65536)):
                    break
                answer, came = answer + piece, time.monotonic()
            else:
                raise TimeoutError
    except TimeoutError:
        if not _whole(answer):
            return 0, time.monotonic() - began, b"", f"no answer within {LIMIT_S:g} s, but {answer[:200]!r}"
    except ConnectionError:
        pass
    seconds = (came if answer else time.monotonic()) - began
    if answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head:
        return 0, seconds, b"", None
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    size = headers.get("content-length", "")
    body = body[: int(size)] if size.isdigit() else b""
    return int(status.split()[1]), seconds, body, fault_of(int(status.split()[1]), headers, body)


def _whole(answer: bytes) -> bool:
    """Returns whether an answer came, on a connection that is kept because the request was changed to ask for that."""
    return answer.startswith(b"HTTP/1.1 ") and b"\r\n\r\n" in answer


def by_schema(server: own_server.Server, count: int, seed: int, tally: Tally) -> None:
    """Sends `count` requests that schemathesis makes of the OpenAPI document, valid ones and others."""
    import hypothesis
    import requests
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    modes = list(schemathesis.GenerationMode)
    weights = [6 if "predict" in operation.path else 1 for operation in operations]
    for operation, weight in zip(operations, weights, strict=True):
        for mode in modes:
            examples = max(1, round(count * weight / sum(weights) / len(modes)))

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=examples,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=[hypothesis.Phase.generate],
            )
            @hypothesis.given(operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                began = time.monotonic()
                if "predict" in case.path and isinstance(case.query, dict):
                    case.query.setdefault("n", 1)
                try:
                    answer = case.call(timeout=LIMIT_S)
                except Exception as error:
                    if "timed out" in str(error).lower():
                        tally.add("OpenAPI", 0, LIMIT_S, b"", f"no answer within {LIMIT_S:g} s", repr(case).encode())
                    elif isinstance(error, requests.exceptions.ConnectionError):
                        tally.add("OpenAPI", 0, time.monotonic() - began, b"", None, repr(case).encode())
                    return  # schemathesis cannot send it
                headers = {name.lower(): value[0] for name, value in answer.headers.items()}
                fault = fault_of(answer.status_code, headers, answer.content)
                seconds, asked = time.monotonic() - began, repr(case).encode()
                tally.add("OpenAPI", answer.status_code, seconds, answer.content, fault, asked)

            try:
                send()
            except hypothesis.errors.Unsatisfiable:
                continue  # an operation without parameters cannot be asked wrongly


def memory_mib(server: own_server.Server) -> dict[str, float]:
    """Returns the resident memory of the processes that speak HTTP, in MiB."""
    sizes: Counter[str] = Counter()
    for role, process in server.processes():
        if role in ("ProxyActor", "ingress"):
            sizes[role] += process.memory_info().rss
    return {role: size / 2**20 for role, size in sorted(sizes.items())}


def attack(server: own_server.Server, options: argparse.Namespace) -> tuple[Tally, list[dict[str, float]]]:
    """Returns what was answered, and the memory before, after the first third, and at the end."""
    url = httpx.URL(server.url)
    address, tally = (url.host, url.port or 80), Tally()
    images = [*own_server.IMAGES, *(path for folder in options.images for path in sorted(folder.rglob("*.*"))[:50])]
    files = corpus([path for path in images if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")])
    rng, memory = random.Random(options.seed), [memory_mib(server)]
    kinds, shares = list(KINDS), [share for _, share in KINDS.values()]
    for part in (1, 2):
        count = round(options.requests * part / 3)

        def one(number: int) -> None:
            if time.monotonic() < ends:  # noqa: B023
                generator = random.Random(options.seed + number)
                kind = generator.choices(kinds, shares)[0]
                message = KINDS[kind][0](generator, files)
                tally.add(kind, *ask(address, message), message)

        before = tally.requests
        by_schema(server, min(round(count * SCHEMA_SHARE), round(options.seconds * 3)), options.seed + part, tally)
        ends = time.monotonic() + options.seconds * part / 3
        sent = tally.requests - before  # fewer than were asked for, if an operation has few examples
        with ThreadPoolExecutor(options.clients) as threads:
            first = rng.randrange(2**40)
            list(threads.map(one, range(first, first + count - sent)))
        memory.append(memory_mib(server))
    return tally, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own_server.add_options(parser)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=3600, help="ends earlier, after so many seconds")
    parser.add_argument("--clients", type=int, default=4, help="requests at a time")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="folders with more images to mutate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.tiny:
        options.requests, options.seconds = 300, 15.0
    with own_server.measured(options, {"n": 300, "n0": 20, "cap": 100, "num_cpus": 0}) as server:
        began = time.monotonic()
        tally, memory = attack(server, options)
        ready = server.get("/readyz")[0]
    how = f"in {time.monotonic() - began:.0f} s, {options.clients} at a time, seed {options.seed}"
    lines = [f"{tally.requests:,} requests {how}"]
    for kind, counts in tally.statuses.items():
        shown = ", ".join(f"{status or 'closed'}: {n:,}" for status, n in sorted(counts.items()))
        lines.append(f"  {kind:<18} {counts.total():>7,}   {shown}")
    lines += [f"  {times:,} times {words}" for words, times in tally.refusals.most_common(5)]
    lines.append(f"slowest answer: {tally.slowest_s:.1f} s")
    for when, sizes in zip(("before", "after a third", "at the end"), memory, strict=True):
        lines.append(f"memory {when}: " + ", ".join(f"{role} {size:.0f} MiB" for role, size in sizes.items()))
    failures = list(tally.failures)
    failures += [f"nothing was sent of {kind}" for kind in ("OpenAPI", *KINDS) if not tally.statuses.get(kind)]
    grown = {role: memory[-1][role] - memory[1].get(role, 0) for role in memory[-1]}
    if tally.requests > 5000:  # before, caches fill
        failures += [f"{role} grew by {mib:.0f} MiB" for role, mib in grown.items() if mib > GROWTH_MIB]
    if ready != 200:
        failures.append(f"/readyz answers {ready} at the end")
    lines.append(f"{len(failures)} failures")
    text = "\n".join([*lines, *failures[:SHOWN]])
    print(text)
    if options.out:
        options.out.write_text(f"python {' '.join(sys.argv)}\n{text}\n", encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
