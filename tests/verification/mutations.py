"""Random changes of records: another value of the same kind, or a strange one, at one to three places."""

from __future__ import annotations

import base64
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from checking import at, changed

from macer_serve.errors import ParameterError
from macer_serve.verification import Verdict

SECONDS = 5.0  # of processor time, for any mutant
MEMORY_KIB = 2**20  # more than before, for any mutant
STRANGE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**52, 2**70, 1e300, -1e-300, 5e-324, 0.5, "", "x", "\ud800", [], [[]], {}, {"a": 1},
    [1, 2], [-1], [[1]], [[[1, 2]]], "n", "soft", "predict", "sha256:" + 64 * "0",
]  # fmt: skip


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def near(value: Any, dice: np.random.Generator) -> Any:
    """Returns another value of the same kind, or a strange one."""
    if isinstance(value, bool) or dice.random() < 0.3:
        return not value if isinstance(value, bool) else STRANGE[dice.integers(len(STRANGE))]
    if isinstance(value, int):
        return value + int(dice.choice([-1, 1, 10, -10, 1000]))
    if isinstance(value, float):
        return value * float(dice.choice([0.5, 0.99, 1.01, 2.0])) + float(dice.choice([0.0, 1e-6]))
    if isinstance(value, str) and value:
        k = int(dice.integers(len(value)))
        return value[:k] + chr(33 + (ord(value[k]) - 32) % 90) + value[k + 1 :]
    return STRANGE[dice.integers(len(STRANGE))]


def path_into(record: Any, dice: np.random.Generator) -> tuple[Any, ...]:
    path: tuple[Any, ...] = ()
    inner = record
    while isinstance(inner, dict | list) and inner and (not path or dice.random() < 0.7):
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        path = (*path, keys[int(dice.integers(len(keys)))])
        inner = at(record, path)
    return path


def mutated(record: dict[str, Any], dice: np.random.Generator) -> dict[str, Any]:
    """Returns the record with one to three fields changed."""
    for _ in range(int(dice.integers(1, 4))):
        path = path_into(record, dice)
        record = changed(record, path, near(at(record, path), dice))
    return record


class Trial:
    """Many mutants, none of which may be accepted, crash a check, or cost much."""

    def __init__(self) -> None:
        self.seen = Counter[tuple[str, str]]()  # by what was tried and the verdict
        self.slowest, self.largest = 0.0, 0

    def judge(self, what: str, document: Any, check: Callable[[], Verdict]) -> None:
        """Checks a mutant of the kind `what`. A document that cannot be read is refused, too."""
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            verdict = check()
        except ParameterError:
            verdict = Verdict.NOT_READABLE
        self.slowest = max(self.slowest, time.process_time() - began)
        self.largest = max(self.largest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert verdict.refutes or verdict is Verdict.NOT_AUTHENTICATED, (what, verdict, document)
        self.seen[what, verdict.value] += 1

    def end(self, title: str, kinds: int) -> None:
        """Prints what the mutants came to. Checks what they cost, and that so many kinds were tried."""
        print(f"\n{title}, {self.seen.total():,} mutants")
        for (what, verdict), times in sorted(self.seen.items()):
            print(f"{times:6} {what}: {verdict}")
        more = f"the largest raised the peak memory by {self.largest / 1024:.0f} MiB"
        print(f"slowest: {self.slowest:.2f} s of processor time; {more}")
        print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
        assert self.slowest < SECONDS
        assert self.largest < MEMORY_KIB
        assert len({what for what, _ in self.seen}) >= kinds
