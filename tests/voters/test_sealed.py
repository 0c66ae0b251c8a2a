"""After warm-up a voter stays the same function, or says so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cases import voter_of
from torch import nn

from macer_serve.errors import EngineError
from macer_serve.smoothing.votes import Draw
from macer_serve.voters import Task
from macer_serve.voters.batched import BatchedVoter
from macer_serve.voters.torch import TorchEngine

SHAPE = (3, 8, 8)
TASK = Task(np.zeros((8, 8, 3), np.int32), bytes(16), Draw("estimation", 0, 40))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "eager"])
def voter(request: pytest.FixtureRequest) -> Iterator[BatchedVoter]:
    with voter_of(
        network(), input_shape=SHAPE, sigma=0.25, batch=32, workers=1, precision="fp32", compile=request.param
    ) as made:
        assert ("compiled" in made.engine) == request.param
        yield made


@pytest.fixture
def globals_restored() -> Iterator[None]:
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("change", ["deterministic", "matmul precision"])
def test_a_changed_global_of_torch_is_an_error_until_it_is_restored(
    voter: BatchedVoter, change: str, globals_restored: None
) -> None:
    before = voter.submit([TASK]).result()[0]
    if change == "deterministic":
        torch.use_deterministic_algorithms(True)
    else:
        torch.set_float32_matmul_precision("medium")
    with pytest.raises(EngineError, match="another function"):
        voter.submit([TASK]).result()
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(voter.submit([TASK]).result()[0], before)


def compiled_engine(voter: BatchedVoter) -> TorchEngine:
    engine = voter._engine
    assert isinstance(engine, TorchEngine)
    if not engine.compiled:
        pytest.skip("an uncompiled engine has nothing to recompile")
    return engine


def test_a_new_shape_is_an_error_and_not_a_recompilation(voter: BatchedVoter) -> None:
    engine = compiled_engine(voter)
    with pytest.raises(EngineError, match="no compiled graph for 31 copies"):
        voter._pool.submit(engine.logits, np.zeros((31, 8, 8, 3), np.int16)).result()
    voter.submit([TASK]).result()


def test_inductors_code_itself_refuses_another_shape(voter: BatchedVoter) -> None:
    graph = compiled_engine(voter)._graphs[32]
    with pytest.raises(AssertionError, match="expected size 31==32"), torch.inference_mode():
        graph(torch.zeros((31, 8, 8, 3), dtype=torch.int16))


def test_votes_are_counted_by_the_graphs_of_the_warm_up(voter: BatchedVoter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiles afterwards, whatever the thread's grad mode: dynamo is not called."""
    engine = compiled_engine(voter)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("torch.compile is called after warm-up")

    before, graphs = voter.submit([TASK]).result()[0], dict(engine._graphs)
    monkeypatch.setattr(torch, "compile", refuse)
    with torch.enable_grad():
        np.testing.assert_array_equal(voter.submit([TASK]).result()[0], before)
    assert engine._graphs == graphs
    assert sorted(graphs) == list(voter.batch_sizes)


def test_many_threads_at_a_time_give_the_votes_of_one(voter: BatchedVoter) -> None:
    """Nothing is checked or compiled between passes, however many threads there are."""
    compiled_engine(voter)
    expected = voter.submit([TASK]).result()[0]
    for options in ({"workers": 2}, {"workers": 4}):
        with voter_of(network(), input_shape=SHAPE, sigma=0.25, batch=32, precision="fp32", **options) as other:
            assert other.engine == voter.engine
            for future in [other.submit([TASK]) for _ in range(500)]:
                np.testing.assert_array_equal(future.result()[0], expected)


def test_other_voters_compile_while_one_is_sealed(voter: BatchedVoter) -> None:
    """More of them than dynamo's own limit of recompilations, each another network of the same code."""
    compiled_engine(voter)
    before = voter.submit([TASK]).result()[0]
    engines = set()
    for width in range(9):
        other = nn.Sequential(nn.Flatten(), nn.Linear(192, 3 + width), nn.ReLU(), nn.Linear(3 + width, 4))
        with voter_of(other, input_shape=SHAPE, sigma=0.25, batch=16, workers=1, precision="fp32") as made:
            assert "compiled" in made.engine
            engines.add(made.engine)
    assert len(engines) == 9
    np.testing.assert_array_equal(voter.submit([TASK]).result()[0], before)
