"""Random plans of every kind, and runs whose votes are given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from macer_serve.smoothing.certification import Certification, Claim, Done
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw


def any_plan() -> st.SearchStrategy[Plan]:
    """Returns a strategy for plans of every mode, bound and stopping rule."""
    kinds = st.sampled_from([{}, {"radius": 0.05}, {"radius": 0.3}, {"tolerance": 0.3}, {"tolerance": 0.02}])
    certify = st.builds(
        lambda kind, **rest: Plan(**kind, **rest),
        kinds, n0=st.integers(1, 60), n=st.integers(1, 400), alpha=st.sampled_from([0.001, 0.05]),
        bound=st.sampled_from(["one-sided", "two-sided", "soft"]),
    )  # fmt: skip
    predict = st.builds(Plan, n=st.integers(1, 400), alpha=st.sampled_from([0.001, 0.05]), mode=st.just("predict"))
    return st.one_of(certify, certify, certify, predict)


def finish(run: Certification, winners: npt.NDArray[np.int64], size: int | None = None) -> Claim:
    """Selection is unanimous for class 1; copy j of the estimation votes for winners[j]."""
    while not isinstance(want := run.wants(size), Done):
        assert isinstance(want, Draw)
        picked = np.ones(len(want), np.int64) if want.purpose == "selection" else winners[want.start : want.stop]
        run.add(want, np.bincount(picked, minlength=run.classes))
    return run.claim()
