"""Claim: at ten times its capacity the server keeps the deadline of all that it admits, and refuses the rest at once.

Of the admitted requests at least 99 % are answered within their deadline; the p99 of a 429 is at most 250 ms; its
Retry-After is within a factor of 2 of the truth; an idle server's latency is back 5 s after the load. 500 slow uploads
beside the load change nothing.

    python benchmarks/overload.py [--times 10] [--seconds 120] [--deadline 10] [--uploads 500]

It starts `macer serve` of the shipped deployment. Capacity is the answers per second of a closed loop of 16 clients.
The load is an open loop (Poisson) of the default plan with `timeout_s` = `--deadline`, from one asyncio process. On two
cores the generator has the last core (`--generator-cpus`) and the server the others (`--server-cpus`, by taskset), so
that neither takes the other's time; proxy, ingress and voter share the server's cores as they do for users. The
generator's own delay is printed: how late it sent requests. The idle latency is that of requests of 300 votes. They
show the recovery, too, one every half second.

Three phases: the load; bursts; and the load beside slow uploads, which send one byte a second from 50 addresses of this
machine and are opened again when the server closes them.

Retry-After is compared with two truths, in seconds and at least 1, since the header has no smaller values:
- the stream: how long after a 429 a request was sent that was admitted, in the load itself;
- bursts at a server that was idle, of twice what fits into the deadline. When the first is refused, one client asks
  again and again, in every second burst for votes that take half of the deadline. Its first promise is compared with
  how long the server took to admit it.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import math
import os
import time
from itertools import islice
from typing import Any

from engine import machine
from load import REFUSED, Client, Question, Reply, Report, closed_loop, open_loop, quantiles, questions, statuses
from own_server import IMAGES, Server, add_options, measured, pin_generator
from slow_uploads import SlowUploads

_GRACE_S = 0.5  # of the network and the generator, beyond the deadline
_RECOVERY_S = 60.0
_BACK = 2.0  # an idle server's latency is back when it is at most this multiple of what it was
_PROBE_S = 0.5  # between the requests that show the recovery
_PATIENCE_S = 1.0  # a request that was not refused by then is admitted
_SHORT = {"tolerance": 1e-6, "n": 300}


def in_time(reply: Reply, deadline: float) -> bool:
    """Returns whether an admitted request was answered, with its whole proof, within its deadline."""
    return reply.whole and reply.ended - reply.sent <= deadline + _GRACE_S


def promised(reply: Reply) -> float:
    """Returns the seconds of Retry-After, NaN if there are none."""
    return float(reply.retry_after) if reply.retry_after and reply.retry_after.isdigit() else math.nan


def within_two(said: float, true: float) -> bool:
    """Returns whether the promise is within a factor of 2 of the truth, both at least one second."""
    return max(1.0, true) / 2 <= said <= 2 * max(1.0, true)


class Overload:
    """One server under load, and what is printed about it."""

    def __init__(self, options: argparse.Namespace, server: Server, client: Client, say: Report) -> None:
        self.options, self.server, self.client, self.say = options, server, client, say
        self.parameters: dict[str, Any] = {"model": server.model, "timeout_s": options.deadline}
        if options.tiny:
            self.parameters["n"] = 300
        self.short = {"model": server.model, **_SHORT}
        self.capacity = self.votes_s = self.idle_s = math.nan

    def asked(self, seed: int) -> Any:
        return questions("default", self.parameters, IMAGES, seed)

    async def calibrate(self) -> None:
        """Measures the capacity, and the latency of an idle server."""
        await closed_loop(self.client, 2, 0.2 * self.options.calibration, self.asked(1))
        self.idle_s = await self.single(6)
        run = await closed_loop(self.client, 16, self.options.calibration, self.asked(2))
        self.capacity, self.votes_s = len(run.answers) / run.seconds, run.votes / run.seconds
        self.say(f"idle: {1e3 * self.idle_s:.0f} ms at p50; capacity: {self.capacity:.2f} answers/s at 16 clients")

    async def single(self, count: int) -> float:
        """Returns the median latency of short requests of an idle server, in seconds."""
        asked = questions("short", self.short, IMAGES, 3)
        found = [await self.client.ask(question) for question in islice(asked, count)]
        return quantiles((reply.seconds for reply in found if reply.status == 200), 1.0)[0]

    async def load(self, name: str) -> None:
        """Prints what a load of many times the capacity came to, and how long the server needed afterwards."""
        rate, deadline = self.options.times * self.capacity, self.options.deadline
        began = time.monotonic()
        sending = asyncio.create_task(open_loop(self.client, rate, self.options.seconds, self.asked(4), seed=4))
        await asyncio.sleep(self.options.seconds)
        first, back = await self.recovery(began + self.options.seconds)
        run = await sending
        admitted = [reply for reply in run.replies if reply.status != 429]
        refused = [reply for reply in run.replies if reply.status == 429]
        kept = sum(in_time(reply, deadline) for reply in admitted)
        late = quantiles(reply.sent - reply.due for reply in run.replies)
        p50, p95, p99 = quantiles(reply.ended - reply.sent for reply in run.answers)
        r50, r95, r99 = quantiles(reply.ended - reply.sent for reply in refused)
        self.say(f"\n{name}: {rate:.1f} requests/s for {self.options.seconds:g} s, deadline {deadline:g} s")
        self.say(f"  statuses        {statuses(run.replies)}")
        self.say(
            f"  admitted        {len(admitted)}; with their whole proof within the deadline: {kept} "
            f"({100 * kept / max(1, len(admitted)):.2f} %); p50 {p50:.0f} ms, p95 {p95:.0f}, p99 {p99:.0f}"
        )
        self.say(f"  answers/s       {len(run.answers) / run.seconds:.2f} of {self.capacity:.2f}")
        self.say(f"  429s            p50 {r50:.0f} ms, p95 {r95:.0f}, p99 {r99:.0f}")
        self.say(f"  Retry-After     {self.next_admitted(run.replies)}")
        self.say(
            f"  recovery        admits again {first:.1f} s after the load; the latency of an idle server is back after "
            f"{back:.1f} s"
        )
        self.say(
            f"  generator       {100 * run.generator:.0f} % of a core; requests sent late by p50 {late[0]:.1f} ms, "
            f"p99 {late[2]:.1f}"
        )

    def next_admitted(self, replies: list[Reply]) -> str:
        """Returns how Retry-After compares with when the next request was admitted."""
        times = sorted(reply.sent for reply in replies if reply.status == 200)
        ratios, missing, right = [], 0, 0
        for reply in replies:
            if reply.status not in REFUSED:
                continue
            said = promised(reply)
            missing += math.isnan(said)
            at = bisect.bisect(times, reply.sent)
            if at < len(times) and not math.isnan(said):
                true = times[at] - reply.sent
                ratios.append(said / max(1.0, true))
                right += within_two(said, true)
        if not ratios:
            return f"nothing to compare; missing in {missing}"
        p50, p95, p99 = quantiles(ratios, 1.0)
        return (
            f"over the time to the next admission: p50 {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f}; within a factor of 2: "
            f"{100 * right / len(ratios):.1f} % of {len(ratios)}; missing in {missing}"
        )

    async def recovery(self, end: float) -> tuple[float, float]:
        """Returns the seconds from the load's end to the first admitted request, and to an idle server's latency."""
        first = self.admitted(next(self.asked(5)))
        sent, back = await asyncio.gather(first, self.back_to_idle())
        return sent - end, back - end

    async def admitted(self, question: Question) -> float:
        """Returns when a request was first admitted, asking again and again; infinity for never.

        A request that is not refused within `_PATIENCE_S` is admitted.
        """
        end = time.monotonic() + _RECOVERY_S
        while (sent := time.monotonic()) < end:
            asked = asyncio.create_task(self.client.ask(question))
            done, _ = await asyncio.wait((asked,), timeout=_PATIENCE_S)
            if not done or asked.result().status == 200:
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                return sent
            await asyncio.sleep(0.1)
        return math.inf

    async def back_to_idle(self) -> float:
        """Returns when a short request first took no longer than at an idle server; infinity for never."""
        end = time.monotonic() + _RECOVERY_S
        asked = questions("short", {**self.short, "timeout_s": 2}, IMAGES, 5)
        while time.monotonic() < end:
            reply = await self.client.ask(next(asked))
            if reply.whole and reply.seconds <= _BACK * self.idle_s:
                return reply.sent
            await asyncio.sleep(_PROBE_S)
        return math.inf

    async def burst(self, parameters: dict[str, Any]) -> tuple[float, float]:
        """Returns a promise of Retry-After, and how long the server took to admit; NaN if it refused nothing."""
        count = math.ceil(2 * self.options.deadline * self.capacity) + 2
        tasks = [asyncio.create_task(self.client.ask(question)) for question in islice(self.asked(6), count)]
        try:
            for done in asyncio.as_completed(tasks):
                if (await done).status == 429:
                    break
            question = Question("probe", IMAGES[0], {**self.parameters, **parameters})
            began = time.monotonic()
            asked = asyncio.create_task(self.client.ask(question))
            done, _ = await asyncio.wait((asked,), timeout=_PATIENCE_S)
            if not done or asked.result().status != 429:
                asked.cancel()
                return math.nan, 0.0
            return promised(asked.result()), await self.admitted(question) - began
        finally:
            await asyncio.gather(*tasks)

    async def bursts(self) -> None:
        """Prints Retry-After of short and of long requests against how long the server took to admit them."""
        most = max(400, int(self.votes_s * self.options.deadline / 2))
        found = []
        for i in range(self.options.bursts):
            found.append(await self.burst({"tolerance": 1e-6, "n": min(100_000, most)} if i % 2 else {}))
            await asyncio.sleep(1)
        pairs = [(said, true) for said, true in found if not math.isnan(said)]
        shown = ", ".join(f"{said:g}/{true:.1f}" for said, true in pairs)
        right = sum(within_two(said, true) for said, true in pairs)
        self.say(
            f"\nbursts: Retry-After over the seconds until admitted: {shown or 'nothing was refused'}; within a factor "
            f"of 2: {right} of {len(pairs)}"
        )


def apart(options: argparse.Namespace) -> None:
    """Chooses the cores of the generator and of the server, unless the options name them."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1 and options.server_cpus is options.generator_cpus is None:
        options.server_cpus, options.generator_cpus = ",".join(map(str, cores[:-1])), str(cores[-1])


async def measure(options: argparse.Namespace, server: Server, say: Report) -> None:
    async with Client(server.url) as client:
        run = Overload(options, server, client, say)
        await run.calibrate()
        await run.load("load")
        await run.bursts()
        uploads = SlowUploads(server, options.uploads)
        async with uploads.sending():
            say(f"\nbeside {uploads.open} slow uploads: {1e3 * await run.single(6):.0f} ms at p50 for single requests")
            await run.load(f"load beside {options.uploads} slow uploads")
            say(f"  slow uploads    {uploads.open} open at the end, {uploads.closed} were closed by the server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=10, help="the load, in multiples of the capacity")
    parser.add_argument("--seconds", type=float, default=120, help="of each load")
    parser.add_argument("--deadline", type=float, default=10, help="timeout_s of each request, in seconds")
    parser.add_argument("--calibration", type=float, default=15, help="seconds of the closed loop")
    parser.add_argument("--bursts", type=int, default=5)
    parser.add_argument("--uploads", type=int, default=500)
    add_options(parser)
    options = parser.parse_args()
    if options.tiny:
        options.seconds, options.deadline, options.calibration, options.bursts, options.uploads = 1, 1, 0.5, 0, 20
    if not options.running:
        apart(options)
    say = Report(options.out)
    say(machine())
    pin_generator(options.generator_cpus)
    with measured(options) as server:
        say(f"cores: server {options.server_cpus or 'all'}, generator {options.generator_cpus or 'all'}")
        nice = {role: process.nice() for role, process in server.processes()}
        say("nice: " + ", ".join(f"{role} {nice[role]}" for role in ("ProxyActor", "ingress", f"voter-{server.model}")))
        asyncio.run(measure(options, server, say))
    say.save()


if __name__ == "__main__":
    main()
