"""HTTP load from one asyncio process: what was asked, what came back, closed loops and open loops."""

from __future__ import annotations

import asyncio
import json
import math
import random
import resource
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

REFUSED = (429, 503)
NO_ANSWER = 0  # the status of a request whose connection broke
_KEEP_S = 2.0  # shorter than the server keeps an idle connection: else a request may meet the end of one


@dataclass(frozen=True, slots=True)
class Question:
    """A request for a certificate: the name of its plan, an image file, the parameters of the query."""

    plan: str
    image: Path
    parameters: dict[str, Any]


@dataclass(slots=True)
class Reply:
    """What came back, and when: seconds of the monotonic clock. `due` is when the request should have been sent."""

    question: Question
    due: float
    sent: float
    ended: float = math.nan
    status: int = NO_ANSWER
    kind: str = ""  # content type
    retry_after: str | None = None
    body: dict[str, Any] | None = None
    error: str = ""

    @property
    def seconds(self) -> float:
        """Seconds from when the request was due to its answer."""
        return self.ended - self.due

    @property
    def votes(self) -> int:
        """Votes that the answer rests on, those of the selection included."""
        if self.status != 200 or self.body is None:
            return 0
        certificate = self.body["certificate"]
        return sum(map(int, certificate["selection_votes"])) + int(certificate["n"])

    @property
    def whole(self) -> bool:
        """Whether it is an answer whose proof the deadline did not cut short."""
        return self.status == 200 and self.body is not None and self.body["stopped"] != "deadline"


@dataclass(slots=True)
class Run:
    """The replies to a load, in the order in which they ended, and how long it lasted."""

    replies: list[Reply] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    generator_s: float = 0.0  # CPU seconds of this process

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def answers(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.status == 200]

    @property
    def votes(self) -> int:
        return sum(reply.votes for reply in self.replies)

    @property
    def generator(self) -> float:
        """The load generator's share of one core."""
        return self.generator_s / self.seconds


class Client:
    """Sends questions to one server, on as many connections as there are requests in flight."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._images: dict[Path, bytes] = {}

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S)
        self.session = aiohttp.ClientSession(
            self._url, connector=connector, timeout=aiohttp.ClientTimeout(total=600, sock_connect=30)
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.session.close()

    def bytes_of(self, image: Path) -> bytes:
        """Returns the image file, which is read once."""
        if image not in self._images:
            self._images[image] = image.read_bytes()
        return self._images[image]

    async def ask(self, question: Question, due: float | None = None) -> Reply:
        """Returns the reply to a question. A connection that breaks is a reply, too."""
        now = time.monotonic()
        reply = Reply(question, now if due is None else due, now)
        try:
            async with self.session.post(
                "/predict",
                params={name: str(value) for name, value in question.parameters.items()},
                data=self.bytes_of(question.image),
                headers={"Content-Type": "image/png"},
            ) as response:
                body = await response.read()
                reply.status, reply.kind = response.status, response.content_type
                reply.retry_after = response.headers.get("Retry-After")
                if "json" in reply.kind:
                    reply.body = json.loads(body)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reply.error = f"{type(error).__name__}: {error}"[:200]
        reply.ended = time.monotonic()
        return reply


def questions(plan: str, parameters: dict[str, Any], images: Sequence[Path], seed: int = 0) -> Iterator[Question]:
    """Yields requests of one plan, images in random order without end."""
    generator = random.Random(seed)
    while True:
        yield Question(plan, generator.choice(images), parameters)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def closed_loop(client: Client, clients: int, seconds: float, asked: Iterator[Question]) -> Run:
    """Returns the replies to clients that each have one request in flight, until all are answered.

    No request is begun after `seconds`. A client that is refused waits for as long as Retry-After says.
    """
    run, used = Run(began=time.monotonic()), _cpu()

    async def one() -> None:
        while time.monotonic() - run.began < seconds:
            reply = await client.ask(next(asked))
            run.replies.append(reply)
            if reply.status in REFUSED:
                pause = float(reply.retry_after or 1)
                await asyncio.sleep(min(pause, max(0.0, run.began + seconds - time.monotonic())))

    await asyncio.gather(*(one() for _ in range(clients)))
    run.ended = max((reply.ended for reply in run.answers), default=time.monotonic())
    run.generator_s = _cpu() - used
    return run


async def open_loop(client: Client, rate: float, seconds: float, asked: Iterator[Question], seed: int = 0) -> Run:
    """Returns the replies to requests that come at `rate` per second whatever the server does, until all are answered.

    The gaps are exponential, from a fixed seed. Latencies count from when a request was due, so that a slow generator
    hides nothing.
    """
    generator, run, used = random.Random(seed), Run(began=time.monotonic()), _cpu()
    tasks: list[asyncio.Task[None]] = []

    async def one(question: Question, due: float) -> None:
        run.replies.append(await client.ask(question, due))

    due = run.began
    while (due := due + generator.expovariate(rate)) < run.began + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(next(asked), due)))
    await asyncio.gather(*tasks)
    run.ended, run.generator_s = time.monotonic(), _cpu() - used
    return run


def quantiles(values: Iterable[float], unit: float = 1e3) -> tuple[float, float, float]:
    """Returns p50, p95 and p99, in milliseconds for values in seconds; NaN of nothing."""
    found = np.array(list(values))
    if not len(found):
        return math.nan, math.nan, math.nan
    p50, p95, p99 = np.quantile(found, (0.5, 0.95, 0.99)) * unit
    return float(p50), float(p95), float(p99)


def statuses(replies: Iterable[Reply]) -> str:
    """Returns how often each status came, as `200: 31, 429: 5`. Answers that the deadline cut short stand apart."""
    counts: Counter[str] = Counter()
    for reply in replies:
        name = str(reply.status) if reply.status else reply.error.partition(":")[0]
        counts["200 at the deadline" if reply.status == 200 and not reply.whole else name] += 1
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))


class Report:
    """Prints lines as they come, and writes all of them to a file at the end."""

    def __init__(self, out: Path | None) -> None:
        self._out, self._lines = out, list[str]()

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self._lines.append(line)

    def save(self) -> None:
        """Writes the file, if one was asked for."""
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
