"""Drivers draw each copy once, and submit nothing for a run that is done."""

from __future__ import annotations

import numpy as np
import pytest

from macer_serve.smoothing.certification import Certification, Done, Waiting
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw
from macer_serve.smoothing.window import Tally, Window


@pytest.mark.parametrize("size", [None, 1, 7, 100, 1000])
def test_a_tally_asks_for_each_copy_once(size: int | None) -> None:
    draws = [Draw("selection", 0, 100), Draw("estimation", 50, 200), Draw("estimation", 200, 333)]
    tally, asked = Tally(draws), []
    while isinstance(draw := tally.wants(size), Draw):
        asked.append(draw)
    assert isinstance(draw, Waiting)
    assert all(len(draw) <= (size or 1000) for draw in asked)
    copies = [(draw.purpose, i) for draw in asked for i in range(draw.start, draw.stop)]
    assert copies == [(draw.purpose, i) for draw in draws for i in range(draw.start, draw.stop)]
    for draw in asked:
        assert not tally.done
        tally.add(draw, np.array([len(draw), 1]))
    assert isinstance(tally.wants(size), Done)
    assert tally.counted == tally.total == tally.handed_out == 383
    parts = [[d for d in asked if d.purpose == of.purpose and of.start <= d.start < of.stop] for of in draws]
    assert [votes.tolist() for votes in tally.votes] == [[sum(map(len, part)), len(part)] for part in parts]


def test_nothing_is_submitted_for_a_run_that_is_done() -> None:
    run = Certification(Plan(n0=10, n=10_000), classes=2, sigma=0.25)
    window: Window[list[Draw]] = Window(run, (16, 64), workers=1)
    window.fill(lambda draws: draws)
    assert window.oldest is not None
    run.stop("deadline")
    assert len(list(window.drain())) == 2
    window.fill(lambda draws: draws)
    assert window.oldest is None
