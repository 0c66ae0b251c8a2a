"""Claim: under a mixed load with faults every answer equals the one computed offline.

    python benchmarks/mixed_load.py [--minutes 10] [--clients 8] [--kill-every 30] [--hang 0]

It starts `macer serve` of the shipped deployment with two voters, and computes in process, with the server's key file,
the certificate that each request must bring. Then clients send in random order, from a fixed seed: small and large
certifications, streams, requests that they leave in the middle, requests with Serve's own headers, requests with a
deadline that is too short, and 10 % hostile uploads. Every 30 s a voter is killed (SIGKILL), the ingress once in the
middle of the run; `--hang 10` stops a voter for 10 s (SIGSTOP), too. A client that is refused waits for Retry-After.

Compared are the whole certificate and its signature. An answer that its deadline cut short rests on fewer votes; such
answers are verified with their votes counted again, up to `--recounts` of them.

Expected beside 200 are 429 and 503 with Retry-After, and 4xx for hostile uploads. For 20 s after the ingress was
killed, 500 and broken streams are expected, too. Errors must be problem+json. Anything else is printed, and the exit
code is 1.
The private memory of each process must be flat after the first minute.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import time
from pathlib import Path
from typing import Any

import aiohttp
from engine import machine
from faults import Faults, Memory
from hostile import hostile_upload
from judging import Judge, Received, Sent
from load import Client, Report, quantiles
from offline import OfflineProcess
from own_server import IMAGES, Server, add_options, measured, pin_generator

PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "radius": {"radius": 0.25},
    "few": {"tolerance": 1e-6, "n": 1000},
    "class": {"mode": "predict"},
    "large": {"tolerance": 1e-6, "n": 100_000},
}
TINY: dict[str, dict[str, Any]] = {"default": {"n": 200}, "class": {"mode": "predict", "n": 200}}
ACTIONS = {"certify": 50, "stream": 16, "leave": 10, "headers": 8, "deadline": 6, "hostile": 10}  # shares of 100
WEIGHTS = {"default": 40, "radius": 30, "few": 20, "class": 8, "large": 2}
LARGE_IMAGES = 2  # of the images: their certificates take 100,000 votes each
HEADERS = (
    {"x-request-timeout-seconds": "0.001"},
    {"x-request-timeout-seconds": "0"},
    {"x-request-disconnect-disabled": "?1"},
)


class MixedLoad:
    """The clients, what they send, and the judge of what comes back."""

    def __init__(self, options: argparse.Namespace, server: Server, client: Client, offline: OfflineProcess) -> None:
        self.options, self.server, self.client, self.offline = options, server, client, offline
        self.plans = TINY if options.tiny else PLANS
        self.expected: dict[tuple[str, Path], dict[str, Any]] = {}
        self.faults = Faults(server)
        self.judge = Judge(self.expected, self.faults)

    def images(self, plan: str) -> list[Path]:
        """Returns the images that are asked about under a plan."""
        return IMAGES[:LARGE_IMAGES] if self.options.tiny or plan == "large" else IMAGES

    async def compute(self) -> None:
        """Computes what the server must answer."""
        for plan, parameters in self.plans.items():
            for image in self.images(plan):
                self.expected[plan, image] = await asyncio.to_thread(
                    self.offline.ask, "certify", str(image), **parameters
                )

    async def run(self) -> None:
        """Sends requests until the time is over."""
        end = time.monotonic() + 60 * self.options.minutes
        await asyncio.gather(*(self._client(random.Random(i), end) for i in range(self.options.clients)))

    async def _client(self, generator: random.Random, end: float) -> None:
        plans = list(self.plans)
        while time.monotonic() < end:
            action = generator.choices(list(ACTIONS), list(ACTIONS.values()))[0]
            plan = generator.choices(plans, [WEIGHTS[name] for name in plans])[0]
            pause = await self._act(action, plan, generator.choice(self.images(plan)), generator)
            await asyncio.sleep(min(pause, max(0.0, end - time.monotonic())))

    async def _act(self, action: str, plan: str, image: Path, generator: random.Random) -> float:
        """Sends one request and has the response judged; returns the seconds to wait before the next one."""
        data, name = self.client.bytes_of(image), action
        parameters = {"model": self.server.model, **self.plans[plan]}
        request: dict[str, Any] = {"data": data, "headers": {"Content-Type": "image/png"}}
        if action == "headers":
            request["headers"] |= generator.choice(HEADERS)
        if action == "stream":
            parameters["stream"] = "true"
        if action == "deadline":
            parameters["timeout_s"] = 0.05
        request["params"] = {name: str(value) for name, value in parameters.items()}
        if action == "hostile":
            upload = hostile_upload(generator, data)
            request, name = upload.request(), f"hostile, {upload.name}"
        sent = Sent(action, name, plan, image, time.monotonic())
        try:
            async with asyncio.timeout(generator.uniform(0.02, 1.0) if action == "leave" else None):
                received = await self._post(request)
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            if action == "leave" and isinstance(error, TimeoutError):
                self.judge.count(sent, "left")
                return 0.0
            self.judge.no_answer(sent, error)
            return 0.5
        return self.judge.judge(sent, received)

    async def _post(self, request: dict[str, Any]) -> Received:
        async with self.client.session.post("/predict", **request) as response:
            text = await response.text()
            return Received(response.status, response.content_type, response.headers.get("Retry-After"), text)

    async def recount(self) -> str:
        """Verifies answers that were cut short, and says how many."""
        chosen = self.judge.chosen(self.options.recounts)
        for image, answer in chosen:
            found = await asyncio.to_thread(self.offline.ask, "recount", str(image), answer)
            if found["verdict"] != "PROVED":
                self.judge.wrong.append(f"cut short, {image.name}: {found}")
        return f"{len(chosen)} of {len(self.judge.cut_short)} answers that their deadline cut short were counted again"


async def measure(options: argparse.Namespace, server: Server, offline: OfflineProcess, say: Report) -> bool:
    """Runs the load and prints what came of it; returns whether all of it was as claimed."""
    async with Client(server.url) as client:
        load, memory, seconds = MixedLoad(options, server, client, offline), Memory(server), 60 * options.minutes
        await load.compute()
        say(f"{len(load.expected)} certificates computed offline; {options.clients} clients, {options.minutes:g} min")
        hang_after = seconds / 4 if options.hang else None
        ingress_after = None if options.tiny else seconds / 2
        async with (
            memory.sampled(min(5.0, seconds / 8)),
            load.faults.happening(
                every_s=options.kill_every, ingress_after_s=ingress_after, hang_after_s=hang_after, hang_s=options.hang
            ),
        ):
            await load.run()
        server.wait_until_ready()
        say()
        for action, outcomes in sorted(load.judge.outcomes.items()):
            say(f"{action:9} {sum(outcomes.values()):6}  {', '.join(f'{k}: {v}' for k, v in sorted(outcomes.items()))}")
        say()
        for plan, latencies in load.judge.latencies.items():
            p50, p95, p99 = quantiles(latencies)
            say(f"{plan:9} {len(latencies):6} answers: p50 {p50:6.0f} ms, p95 {p95:6.0f}, p99 {p99:6.0f}")
        faults, longest = load.faults, max(load.faults.back, default=math.nan)
        say(
            f"\nkilled: {len(faults.voters)} voters (replaced after {longest:.1f} s at most), {len(faults.ingress)} "
            f"ingress; stopped: {len(faults.hung)} voters for {options.hang:g} s"
        )
        say(load.judge.promises())
        say(await load.recount())
        lines, flat = memory.table(min(60.0, seconds / 4))
        say("\nprivate memory of each role's largest process, in the first and the last quarter after the first minute")
        for line in lines:
            say(line)
        say(f"\nmemory is {'flat' if flat else 'not flat'}; {len(load.judge.wrong)} answers were not as expected")
        for fault in load.judge.wrong[:50]:
            say(f"  {fault}")
        return not load.judge.wrong and (flat or options.tiny)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=30, help="seconds between the ends of voters")
    parser.add_argument("--hang", type=float, default=0, help="seconds for which a voter is stopped, once")
    parser.add_argument("--recounts", type=int, default=20, help="answers cut short that are counted again, at most")
    add_options(parser)
    options = parser.parse_args()
    if options.tiny:
        options.minutes, options.clients, options.kill_every, options.recounts = 0.08, 4, 2, 1
    say = Report(options.out)
    say(machine())
    with measured(options, {"replicas": 2}) as server, OfflineProcess(server) as offline:
        pin_generator(options.generator_cpus)
        right = asyncio.run(measure(options, server, offline, say))
    say.save()
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
