"""Whose pass a voter makes next, and what a call returns that several passes answer."""

from __future__ import annotations

from concurrent.futures import CancelledError

import numpy as np
import numpy.typing as npt
import pytest

from macer_serve.smoothing.votes import Draw
from macer_serve.voters.calls import Call, Calls
from macer_serve.voters.packing import Batch, packed, passes_of
from macer_serve.voters.tasks import Task

X = np.zeros((2, 2, 3), np.int32)


def call(copies: int, turn: float = 0.0, start: int = 0) -> Call:
    tasks = (Task(X, b"", Draw("estimation", start, start + copies)),)
    return Call(tasks, 3, packed(tasks, (10,)), turn)


def logits_of(batch: Batch) -> npt.NDArray[np.float32]:
    """Every third copy is voted class 2."""
    logits = np.zeros((sum(len(draw) for _, draw in batch), 3), np.float32)
    copies = np.concatenate([np.arange(draw.start, draw.stop) for _, draw in batch])
    logits[copies % 3 == 0, 2] = 1
    return logits


def order(calls: Calls) -> list[Call]:
    made = []
    while (found := calls.next_pass()) is not None:
        made.append(found[0])
        found[0].count(found[1], logits_of(found[1]))
    return made


def test_passes_go_by_turn_and_one_in_eight_is_of_the_call_that_has_waited_longest() -> None:
    calls, long, short = Calls(), call(40, turn=60.0), call(90, turn=1.0)
    calls.add(long)
    calls.add(short)
    assert order(calls) == [*[short] * 7, long, short, short, *[long] * 3]


def test_calls_of_one_turn_are_made_in_the_order_of_arrival() -> None:
    calls, made = Calls(), [call(20) for _ in range(4)]
    for one in made:
        calls.add(one)
    assert order(calls) == [one for one in made for _ in range(2)]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_call_returns_the_votes_of_all_its_passes_in_whatever_order_they_end(reverse: bool) -> None:
    tasks = tuple(
        Task(X, b"", Draw("estimation", start, start + 17, beta)) for start in (0, 100) for beta in (None, 1.0)
    )
    asked = Call(tasks, 3, packed(tasks, (10,)), 0.0)
    calls = Calls()
    calls.add(asked)
    found = []
    while (one := calls.next_pass()) is not None:
        found.append(one[1])
    assert len(found) == 7
    for batch in found[::-1] if reverse else found:
        assert not asked.over
        asked.count(batch, logits_of(batch))
    hard, soft, *_ = asked.votes.result(timeout=0)
    assert hard.tolist() == [11, 0, 6]
    assert soft.sum(1).tolist() == [17, 17, 17]


def test_a_call_that_fails_or_is_cancelled_leaves_its_other_passes_unmade_and_others_alone() -> None:
    calls, failing, cancelled, other = Calls(), call(40, 0.0), call(40, 1.0), call(40, 2.0)
    for one in (failing, cancelled, other):
        calls.add(one)
    begun = [calls.next_pass(), calls.next_pass()]
    assert [found[0] for found in begun if found] == [failing, failing]
    assert begun[0] is not None
    _, batch = begun[0]
    failing.fail(ValueError("no class there"))
    failing.count(batch, logits_of(batch))  # a pass that had begun
    failing.fail(ValueError("and another"))
    cancelled.votes.cancel()
    assert order(calls) == [other] * 4
    with pytest.raises(ValueError, match="no class there"):
        failing.votes.result(timeout=0)
    assert other.votes.result(timeout=0)[0].tolist() == [26, 0, 14]


def test_what_waits_when_the_voter_is_closed_is_cancelled() -> None:
    calls, waiting = Calls(), call(40)
    calls.add(waiting)
    calls.cancel()
    assert calls.next_pass() is None
    with pytest.raises(CancelledError):
        waiting.votes.result(timeout=0)


@pytest.mark.parametrize(
    ("copies", "sizes", "passes"),
    [
        (0, (64, 256), []),
        (1, (64, 256), [64]),
        (256, (64, 256), [256]),
        (600, (64, 256), [256, 256, 64, 64]),
        (600, (64,), [64] * 10),
        (5_000, (256, 4096), [4096] + [256] * 4),
        (7_000, (256, 4096), [4096, 4096]),  # twelve small passes would take longer
    ],
)
def test_copies_go_into_large_passes_and_what_is_left_into_few_small_ones(
    copies: int, sizes: tuple[int, ...], passes: list[int]
) -> None:
    assert passes_of(copies, sizes) == passes
    tasks = [Task(X, b"", Draw("estimation", 0, copies // 3)), Task(X, b"", Draw("selection", copies // 3, copies))]
    batches = list(packed(tasks, sizes))
    assert len(batches) == len(passes)
    assert all(sum(len(draw) for _, draw in batch) <= size for batch, size in zip(batches, passes, strict=True))
    for i, task in enumerate(tasks):
        pieces = [draw for batch in batches for j, draw in batch if i == j]
        assert [copy for piece in pieces for copy in range(piece.start, piece.stop)] == list(
            range(task.draw.start, task.draw.stop)
        )
        assert all(piece.purpose == task.draw.purpose for piece in pieces)


def test_a_call_of_nothing_is_answered_at_once() -> None:
    assert Call((), 3, packed((), (10,)), 0.0).votes.result(timeout=0) == []
