"""Two batch sizes: short decisions take small passes, and the votes are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cases import voter_of
from torch import nn

from macer_serve.base_classifier import BaseClassifier
from macer_serve.checkpoint import load_checkpoint
from macer_serve.hardware import multiplies_int8
from macer_serve.smoothing.certification import Certification
from macer_serve.smoothing.noise import noise_for
from macer_serve.smoothing.plan import Plan
from macer_serve.smoothing.votes import Draw
from macer_serve.smoothing.window import EARLY_PASSES, Window
from macer_serve.voters import Task, VoterOptions, drive, open_voter
from macer_serve.voters.batched import BatchedVoter
from macer_serve.voters.engines import Passes

SEED = bytes(16)


@pytest.fixture(scope="module", params=["torch", "onnx", "openvino-int8"])
def voter(request: pytest.FixtureRequest) -> Iterator[BatchedVoter]:
    engine, _, precision = request.param.partition("-")
    if precision == "int8" and not multiplies_int8():
        pytest.skip("without VNNI, int8 products are added with saturation, which voters refuse")
    _, classifier = load_checkpoint("bundled:cifar10")
    options = VoterOptions(engine=engine, device="cpu", precision=precision or "fp32", compile=False)  # type: ignore[arg-type]
    with open_voter(classifier, sigma=0.25, options=options) as made:
        yield made


def test_votes_do_not_depend_on_the_pass_they_were_counted_in(voter: BatchedVoter) -> None:
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.int32) << 18
    whole = voter.submit([Task(x, SEED, Draw("estimation", 0, 256))]).result()[0]
    for cut in (1, 64, 100, 256):
        pieces = [voter.submit([Task(x, SEED, piece)]) for piece in Draw("estimation", 0, 256).cut(cut)]
        np.testing.assert_array_equal(np.sum([piece.result()[0] for piece in pieces], axis=0), whole)


def test_small_tasks_take_small_passes(voter: BatchedVoter, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = voter._engine.logits

    def watched(copies: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        sizes.append(len(copies))
        return original(copies)

    monkeypatch.setattr(voter._engine, "logits", watched)
    x = np.zeros((32, 32, 3), np.int32)
    for size, passes in ((1, [64]), (64, [64]), (65, [64, 64]), (256, [256]), (300, [64, 256])):
        sizes.clear()
        voter.submit([Task(x, SEED, Draw("estimation", 0, size))]).result()
        assert sorted(sizes) == passes  # workers share them, in whatever order


class LastBits:
    """Logits that depend on the batch size in their last bits."""

    device, precision, compiled, build, source = "cpu", "fp32", False, None, None
    tolerance = 1e-3

    def start_thread(self) -> None:
        pass

    def logits(self, copies: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        sums = copies.reshape(len(copies), -1).sum(1, dtype=np.float32) / 255
        return np.stack([sums, 2 - sums * np.float32(1 + len(copies) * 1e-7)], axis=1)

    def plain_logits(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        sums = pixels.reshape(len(pixels), -1).sum(1)
        return np.stack([sums, 2 - sums], axis=1)

    def seal(self) -> None:
        pass


def test_a_small_batch_that_differs_in_one_bit_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    passes = Passes((4, 4, 3), noise_for("exact", 0.25), (16, 64), workers=2)
    with BatchedVoter("test", LastBits(), classes=2, passes=passes) as made:
        assert made.batch_sizes == (64,)
        assert made.engine.startswith("test-cpu-fp32-b64:")
    assert "not used" in caplog.text


@pytest.mark.parametrize(
    ("shape", "batch", "sizes"),
    [((3, 4, 4), None, (64, 256)), ((3, 4, 4), 32, (16, 32)), ((3, 4, 4), 16, (16,)), ((3, 65, 64), None, (16,))],
)
def test_the_sizes_follow_from_the_input(
    shape: tuple[int, int, int], batch: int | None, sizes: tuple[int, ...]
) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 2))
    classifier = BaseClassifier.of_module(module, input_shape=shape, classes=2)
    options = VoterOptions(engine="torch", device="cpu", batch=batch, workers=1, compile=False)
    with open_voter(classifier, sigma=0.25, options=options) as made:
        assert made.batch_sizes == sizes


def test_a_young_run_takes_small_passes_and_few_at_a_time() -> None:
    run = Certification(Plan(n0=100, n=10_000), classes=10, sigma=0.25)
    window: Window[list[Draw]] = Window(run, (64, 256), workers=2)

    def filled() -> list[int]:
        """The sizes of the passes that are submitted next; all are then counted."""
        window.fill(lambda draws: draws)
        sizes = []
        while (draws := window.oldest) is not None:
            sizes.append(sum(map(len, draws)))
            window.count([np.array([len(draw)] + 9 * [0]) for draw in draws])
        return sizes

    assert filled() == 3 * [64]
    sizes = [size for _ in range(6) for size in filled()]
    early = EARLY_PASSES * 256 // 64 - 3
    assert sizes[:early] == early * [64]
    assert set(sizes[early:]) == {256}
    assert filled() == 4 * [256]


def test_an_early_decision_computes_little_more_than_it_uses() -> None:
    """radius=0.1 on an image whose copies agree: some 120 votes; three passes of 64 at most lie ahead."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    nn.init.zeros_(module[1].weight)
    with voter_of(module, input_shape=(3, 4, 4), sigma=0.25, workers=2, compile=False) as made:
        from macer_serve.checkpoint import CheckpointConfig
        from macer_serve.smoothed import SmoothedClassifier

        config = CheckpointConfig(
            name="constant", architecture="test", classes=("a", "b"), input_shape=(3, 4, 4), mean=(0.0,) * 3,
            std=(1.0,) * 3, sigma=0.25, resize=4, files={"model.safetensors": "sha256:" + 64 * "0"},
        )  # fmt: skip
        g = SmoothedClassifier(config, voter=made)
        model_input, plan = g.model_input(np.zeros((4, 4, 3), np.uint8)), Plan(radius=0.1)
        run = g.certification(model_input, plan)
        drive(run, model_input.x, g.seed_proof(model_input, plan).seed, made)
        assert run.claim().stopped == "radius"
        assert run.handed_out - run.claim().n - 100 <= 4 * 64
