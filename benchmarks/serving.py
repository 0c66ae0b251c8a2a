"""Claim: at saturation the server gives answers at least 90 % of the bare engine's votes, for plans of 10,000 and more.

And HTTP and Serve add at most 12 ms at the median to the answer of an idle server.

    python benchmarks/serving.py [--plans default radius] [--clients 1 4 16 64 256] [--parts idle closed open overtake]

It starts `macer serve` of the shipped deployment, and the same model in a process of its own (benchmarks/offline.py)
with the same engine options. One of the two computes at a time, in turns. The load generator is one asyncio process.

- idle: one request at a time, alternating with the same certification in process. Printed are what HTTP and Serve add
  before the upload is there and after the certificate is (the client's time without what the answer's `timing_ms`
  names), and what the whole request takes more than the certification in process.
- closed: each client sends its next request when the last one is answered; who is refused waits for Retry-After. A
  window lasts until the last of its requests is answered. Votes per second are those that answers rest on. Each window
  stands between two rounds of the bare engine, and its share is against their mean. After a warm-up, windows are
  repeated until the votes per second of the last three lie within 5 % of their median (or `--windows` are through: then
  the table says "unstable"). The median of the last three counts; latencies are those of all windows.
- open: requests come at random times (Poisson) at shares of the highest closed rate. Latency counts from when a request
  was due.
- overtake: the latency of requests of 500 votes alone, and beside one client that sends requests of 100,000 votes.

"% lost" is the share of the votes computed on which no answer rests: they were drawn ahead of a stop and thrown away.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from itertools import islice
from typing import Any

from engine import machine
from load import Client, Question, Report, Run, closed_loop, open_loop, quantiles, questions, statuses
from offline import OfflineProcess
from own_server import IMAGES, Server, add_options, measured, pin_generator

PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "radius": {"radius": 0.25},
    "n10000": {"tolerance": 1e-6, "n": 10_000},  # a tolerance that is not reached: all of the votes
    "n100000": {"tolerance": 1e-6, "n": 100_000},
}
TINY: dict[str, dict[str, Any]] = {"default": {"n": 200}, "radius": {"radius": 0.25, "n": 200}}
STABLE = 0.05  # largest distance of the last windows from their median
LAST = 3  # windows that must agree
SHORT, LONG = {"tolerance": 1e-6, "n": 500}, {"tolerance": 1e-6, "n": 100_000}


class Measurement:
    """The server, its bare engine, and what is printed about them."""

    def __init__(
        self, options: argparse.Namespace, server: Server, client: Client, offline: OfflineProcess, say: Report
    ) -> None:
        self.options, self.server, self.client, self.offline, self.say = options, server, client, offline, say
        self.plans = TINY if options.tiny else PLANS
        self.best: dict[str, float] = {}  # answers per second

    def asked(self, plan: str, parameters: dict[str, Any] | None = None, seed: int = 0) -> Any:
        """Returns requests of a plan, without end."""
        found = self.plans[plan] if parameters is None else parameters
        return questions(plan, {"model": self.server.model, **found}, IMAGES, seed)

    async def bare(self) -> float:
        """Returns the votes per second of the bare engine, now."""
        measured = await asyncio.to_thread(self.offline.ask, "rate", self.options.bare_seconds)
        return float(measured["rate"])

    async def idle(self, plan: str) -> None:
        served, inside, around = [], [], []
        for question in islice(self.asked(plan), self.options.idle):
            reply = await self.client.ask(question)
            if reply.status != 200:
                raise SystemExit(f"an idle server answers {reply.status}: {reply.body or reply.error}")
            parameters = {name: value for name, value in question.parameters.items() if name != "model"}
            own = await asyncio.to_thread(self.offline.ask, "certify", str(question.image), **parameters)
            assert reply.body is not None
            if reply.body["certificate"] != own["certificate"]:
                raise SystemExit(f"{question.image.name}: the server's certificate is not the one computed in process")
            served.append(reply.seconds)
            inside.append(own["seconds"])
            around.append(1e3 * reply.seconds - sum(reply.body["timing_ms"].values()))
        p50, p95, _ = quantiles(served)
        own50, added = quantiles(inside)[0], statistics.median(around)
        paired = 1e3 * statistics.median(a - b for a, b in zip(served, inside, strict=True))
        self.say(
            f"{plan:9} {len(served):4} requests: p50 {p50:7.1f} ms, p95 {p95:7.1f}; HTTP and Serve {added:5.1f} of "
            f"them; in process p50 {own50:7.1f}, {p50 - own50:6.1f} less (median of the differences {paired:6.1f})"
        )

    async def closed(self, plan: str, clients: int) -> None:
        seconds = self.options.seconds
        asked = self.asked(plan, seed=clients)
        await closed_loop(self.client, clients, self.options.warm_up, asked)
        windows, bare, computed = [], [await self.bare()], 0
        while len(windows) < self.options.windows and not stable(windows):
            before = await asyncio.to_thread(self.server.counted)
            windows.append(await closed_loop(self.client, clients, seconds, asked))
            computed += await asyncio.to_thread(self.server.counted) - before
            bare.append(await self.bare())
        rates = [window.votes / window.seconds for window in windows]
        shares = [2 * rate / (a + b) for rate, a, b in zip(rates, bare, bare[1:], strict=False)]
        last = slice(-LAST, None)
        answers = statistics.median(len(window.answers) / window.seconds for window in windows[last])
        self.best[plan] = max(answers, self.best.get(plan, 0.0))
        replies = [reply for window in windows for reply in window.replies]
        p50, p95, p99 = quantiles(reply.seconds for reply in replies if reply.status == 200)
        used = sum(window.votes for window in windows)
        generator = statistics.median(window.generator for window in windows)
        self.say(
            f"{plan:9} {clients:7} {len(windows):4}{' ' if stable(windows) else '!'} {answers:9.2f} "
            f"{statistics.median(rates[last]):8.0f} {statistics.median(bare):8.0f} "
            f"{100 * statistics.median(shares[last]):6.1f} {100 * (1 - used / computed):6.1f} "
            f"{p50:7.0f} {p95:7.0f} {p99:7.0f} {100 * generator:5.1f}  {statuses(replies)}"
        )

    async def open(self, plan: str, share: float) -> None:
        rate = share * self.best[plan]
        run = await open_loop(self.client, rate, self.options.open_seconds, self.asked(plan, seed=7), seed=7)
        p50, p95, p99 = quantiles(reply.seconds for reply in run.answers)
        self.say(
            f"{plan:9} {100 * share:6.0f} % {rate:10.2f} {len(run.answers) / run.seconds:10.2f} {p50:7.0f} {p95:7.0f} "
            f"{p99:7.0f} {100 * run.generator:5.1f}  {statuses(run.replies)}"
        )

    async def overtake(self) -> None:
        """Prints the latency of short requests in alternating windows, alone and beside a long one."""
        seconds = self.options.seconds
        found: dict[str, list[float]] = {"alone": [], "beside n = 100,000": []}
        for _ in range(1 if self.options.tiny else 2):
            for name, latencies in found.items():
                long = asyncio.create_task(self._long(seconds)) if name != "alone" else None
                await asyncio.sleep(1.0 if long else 0.0)
                run = await closed_loop(self.client, 1, seconds, self.asked("n500", SHORT))
                latencies += [reply.seconds for reply in run.answers]
                if long:
                    long.cancel()
                    await asyncio.gather(long, return_exceptions=True)
        for name, latencies in found.items():
            p50, p95, p99 = quantiles(latencies)
            self.say(f"n = 500 {name:20} {len(latencies):4} answers: p50 {p50:6.0f} ms, p95 {p95:6.0f}, p99 {p99:6.0f}")

    async def _long(self, seconds: float) -> Run:
        return await closed_loop(self.client, 1, seconds + 60, self.asked("long", LONG))


def stable(windows: list[Run]) -> bool:
    """Returns whether the last windows' votes per second lie near their median."""
    rates = [window.votes / window.seconds for window in windows[-LAST:]]
    middle = statistics.median(rates) if rates else 0.0
    return len(rates) == LAST and all(abs(rate - middle) <= STABLE * middle for rate in rates)


async def measure(options: argparse.Namespace, server: Server, offline: OfflineProcess, say: Report) -> None:
    async with Client(server.url) as client:
        run = Measurement(options, server, client, offline, say)
        for _ in range(2):
            warm: Question = next(run.asked(options.plans[0]))
            await client.ask(warm)
        if "idle" in options.parts:
            say("\nidle: one request at a time")
            for plan in options.plans:
                if plan != "n100000":
                    await run.idle(plan)
        if "closed" in options.parts:
            say(f"\nclosed loop: windows of {options.seconds:g} s and more (! = unstable), alternating with the engine")
            say(
                f"{'plan':9} {'clients':>7} {'win':>4}  {'answers/s':>9} {'votes/s':>8} {'bare':>8} {'% bare':>6} "
                f"{'% lost':>6} {'p50 ms':>7} {'p95':>7} {'p99':>7} {'gen %':>5}  statuses"
            )
            for plan in options.plans:
                for clients in options.clients:
                    await run.closed(plan, clients)
            say("% lost: votes computed and thrown away; gen %: the load generator's share of one core (nice 0)")
        if "open" in options.parts and "closed" in options.parts:
            say(f"\nopen loop: {options.open_seconds:g} s of Poisson arrivals at shares of the best closed rate")
            say(
                f"{'plan':9} {'of best':>8} {'offered/s':>10} {'answers/s':>10} {'p50 ms':>7} {'p95':>7} {'p99':>7} "
                f"{'gen %':>5}  statuses"
            )
            for plan in options.plans:
                for share in options.open:
                    await run.open(plan, share)
        if "overtake" in options.parts:
            say("\none client of n = 500")
            await run.overtake()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["idle", "closed", "open", "overtake"]
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=["default", "radius"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seconds", type=float, default=8, help="in which a window's requests begin")
    parser.add_argument("--warm-up", type=float, default=3, help="seconds before the first window")
    parser.add_argument("--windows", type=int, default=6, help="at most")
    parser.add_argument("--bare-seconds", type=float, default=3, help="a round of the bare engine")
    parser.add_argument("--idle", type=int, default=40, help="requests of the idle part")
    parser.add_argument("--open", nargs="+", type=float, default=[0.5, 0.8, 0.95], help="shares of the best rate")
    parser.add_argument("--open-seconds", type=float, default=20)
    add_options(parser)
    options = parser.parse_args()
    if options.tiny:
        options.clients, options.seconds, options.warm_up, options.windows = [2], 0.5, 0.1, 3
        options.bare_seconds, options.idle, options.open, options.open_seconds = 0.2, 3, [0.5], 0.5
        options.plans = ["default"]
    say = Report(options.out)
    say(machine())
    with measured(options) as server, OfflineProcess(server) as offline:
        pin_generator(options.generator_cpus)
        say(f"{server.model}: {server.get('/readyz')[1]['models'][server.model]['engine']}")
        asyncio.run(measure(options, server, offline, say))
    say.save()


if __name__ == "__main__":
    main()
