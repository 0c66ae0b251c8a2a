"""How a run is carried out changes nothing of what it computes: parts of a batch, averages, saving, curves."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from macer_serve.architectures import base_classifier
from macer_serve.datasets import DATASETS, ImageSet
from training.data import DeviceBatches
from training.loop import Conduct, InterruptedRunError, _Run, train
from training.methods import METHOD_FUNCTIONS, Step
from training.precision import Precision
from training.recipes import Recipe, recipe
from training.run_state import RunFolder
from training.session import TrainingOptions, run_training

Train = Callable[..., Result]
Weights = dict[str, npt.NDArray[np.float64]]
CPU = torch.device("cpu")
EXACT = Precision(CPU, "fp32", False, 1)
RECIPES = {
    "gaussian": recipe("mnist", "gaussian", 0.5),
    "macer": recipe("mnist", "macer", 0.5).with_options(k=3, lam=4.0, defer=0),
    "smoothadv": recipe("mnist", "smoothadv", 0.5).with_options(k=2, attack_steps=3, epsilon=1.0, ramp=0),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return base_classifier("lenet", classes=10, input_shape=(1, 28, 28), mean=(0.5,), std=(0.5,))


def digits(model: nn.Module, count: int = 40) -> tuple[Tensor, Tensor]:
    """Random images, and labels of which the network has half right."""
    images = torch.rand((count, 1, 28, 28), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(images).argmax(1)
    return images, torch.where(torch.arange(count) % 2 == 0, labels, (labels + 1) % 10)


# --micro-batch


def one_update(chosen: Recipe, tmp_path: Path, micro_batch: int | None) -> tuple[_Run, list[Tensor]]:
    """A run after its first step, and what was passed through the network for it."""
    model, passed = lenet(), []
    images, labels = digits(model)
    model.register_forward_pre_hook(lambda model, x: passed.append(x[0].clone()) if model.training else None)
    run = _Run(model, chosen, Conduct(EXACT, micro_batch=micro_batch), RunFolder(tmp_path), seed=3)
    run.update(images, labels, 1.0, 0.1)
    return run, passed


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize(("micro_batch", "parts"), [(16, [16, 16, 8]), (39, [39, 1]), (7, [7, 7, 7, 7, 7, 5])])
def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(
    tmp_path: Path, method: str, micro_batch: int, parts: list[int]
) -> None:
    chosen = RECIPES[method]
    whole, passed_whole = one_update(chosen, tmp_path, None)
    divided, passed = one_update(chosen, tmp_path, micro_batch)
    assert [len(x) for x in passed] == [chosen.k * part for part in parts], "with their copies, so many a pass"
    assert [len(x) for x in passed_whole] == [chosen.k * 40]
    for one, other in zip(whole.model.parameters(), divided.model.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).abs().max() <= 1e-5 * one.grad.abs().max()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    # The same noise on the CPU; attacked images differ by rounding, as gradients do.
    torch.testing.assert_close(torch.cat(passed), passed_whole[0], rtol=0, atol=1e-3 if method == "smoothadv" else 0)


@pytest.mark.parametrize("method", RECIPES)
def test_metrics_count_every_image_once_however_a_batch_is_divided(tmp_path: Path, method: str) -> None:
    sums = {m: one_update(RECIPES[method], tmp_path, m)[0].sums for m in (None, 40, 99, 16, 7, 1)}
    values = {m: {name: value.item() for name, value in of.items()} for m, of in sums.items()}
    if method == "macer":
        assert 10 <= values[None]["inside"] <= values[None]["correct"] < 40
    for m in values:
        assert values[m] == pytest.approx(values[None], rel=1e-5)


def test_a_run_in_parts_ends_where_a_whole_one_does_and_says_so(mnist: Path, train: Train, tmp_path: Path) -> None:
    command = ("--dataset", "mnist", "--data-dir", mnist, "--epochs", 2, "--batch", 16, "--k", 2, "--lam", 1)
    weights, losses = [], []
    for name, how in (("whole", ()), ("parts", ("--micro-batch", 5))):
        result = train(*command, *how, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        weights.append(load_file(tmp_path / name / "model.safetensors"))
        losses.append([line["loss"] for line in log_of(tmp_path / name)])
        recorded = json.loads((tmp_path / name / "config.json").read_text())["recipe"]["micro_batch"]
        assert recorded == (5 if how else None)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)


# --ema


def small_images(count: int) -> ImageSet:
    """Random images of 8x8 pixels."""

    class Source(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.data)

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    source = Source(data=pixels, targets=generator.integers(0, 10, count).tolist())
    return ImageSet(DATASETS["cifar10"], source, tuple("0123456789"))


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    info = DATASETS["cifar10"]
    return base_classifier("resnet20", classes=10, input_shape=(3, 8, 8), mean=info.mean, std=info.std)


def averaged_run(
    folder: Path, ema: float, progress: Callable[[nn.Sequential, int, int], None] = lambda model, epoch, step: None
) -> nn.Sequential:
    """The exported model of two epochs of four steps, the last with fewer images. `progress` sees every step."""
    model = residual()
    options = {"epochs": 2, "batch": 16, "lr": 0.05, "milestones": (), "ema": ema}
    chosen = recipe("cifar10", "gaussian", 0.25).with_options(**options)
    conduct = Conduct(EXACT, save_every=2, progress=lambda epoch, step, steps, metrics: progress(model, epoch, step))
    batches = DeviceBatches(small_images(60), batch=16, seed=0, device=CPU, limit=None)
    return train(model, batches, chosen, seed=0, conduct=conduct, folder=RunFolder(folder), identity={})


def test_the_average_is_the_exponential_moving_one_of_every_steps_weights(tmp_path: Path) -> None:
    """w_1, then d a + (1 - d) w: batch normalisation's statistics, too."""
    steps: list[Weights] = []

    def record(model: nn.Sequential, epoch: int, step: int) -> None:
        steps.append({name: value.double().numpy().copy() for name, value in model.state_dict().items()})

    exported = averaged_run(tmp_path, 0.8, record).state_dict()
    assert len(steps) == 8
    assert any("running_var" in name for name in exported)
    for name, value in exported.items():
        average = steps[0][name]
        for weights in steps[1:]:
            average = 0.8 * average + 0.2 * weights[name]
        if "num_batches_tracked" in name:
            assert value.item() == 8, "a count is not averaged"
        else:
            np.testing.assert_allclose(value.numpy(), average, rtol=1e-5, atol=1e-6)
            assert np.abs(average - steps[-1][name]).max() > 1e-4, "not the weights themselves"


def test_the_average_of_one_step_is_its_weights(tmp_path: Path) -> None:
    """Nothing of the initial weights is left in it."""
    model = lenet()
    images, labels = digits(model)
    run = _Run(model, RECIPES["gaussian"].with_options(ema=0.99), Conduct(EXACT), RunFolder(tmp_path), seed=0)
    run.update(images, labels, 1.0, 0.1)
    assert run.exported is not run.model
    for name, value in run.exported.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name])


@pytest.mark.parametrize("way", ["stopped", "lost"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_average_interrupted_within_an_epoch_continues_bit_for_bit(tmp_path: Path, way: str, epoch: int) -> None:
    """Stopped by SIGTERM after the third step, or lost there, after the second was saved."""

    def interrupt(model: nn.Sequential, at: int, step: int) -> None:
        if (at, step) == (epoch, 3):
            if way == "lost":
                raise ConnectionError
            os.kill(os.getpid(), signal.SIGTERM)

    expected = averaged_run(tmp_path / "undisturbed", 0.8)
    with pytest.raises(ConnectionError if way == "lost" else InterruptedRunError):
        averaged_run(tmp_path / "disturbed", 0.8, interrupt)
    saved = torch.load(RunFolder(tmp_path / "disturbed").states()[-1], weights_only=True)
    assert (saved["epoch"], saved["step"]) == (epoch, 2 if way == "lost" else 3)
    continued = averaged_run(tmp_path / "disturbed", 0.8)
    for name, value in expected.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value)
    states = [torch.load(RunFolder(tmp_path / n).states()[-1], weights_only=True) for n in ("undisturbed", "disturbed")]
    for part in ("model", "average"):
        for name, value in states[0][part].items():
            assert torch.equal(states[1][part][name], value)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_checkpoint_holds_the_average_or_the_weights(mnist: Path, train: Train, tmp_path: Path, ema: float) -> None:
    result = train(*QUICK, "--data-dir", mnist, "--ema", ema, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    exported = load_file(tmp_path / "out" / "model.safetensors")
    state = torch.load(RunFolder(tmp_path / "out.run").states()[-1], weights_only=True)
    assert all(torch.equal(state["average" if ema else "model"][name], value) for name, value in exported.items())
    assert any(not torch.equal(state["model"][name], value) for name, value in exported.items()) == bool(ema)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["recipe"]["ema"] == ema


# --save-every, --keep

# 40 images: three steps an epoch.
QUICK = ("--dataset", "mnist", "--method", "gaussian", "--epochs", 2, "--batch", 16, "--lr", 0.1)


def log_of(out: Path) -> list[dict[str, Any]]:
    return RunFolder(out.with_name(out.name + ".run")).entries()


def states_of(out: Path) -> list[tuple[int, int]]:
    """Epochs and steps of the states that are kept."""
    paths = out.with_name(out.name + ".run").glob("state-*")
    return sorted((int(path.stem.split("-")[1]), int(path.stem.split("-")[2])) for path in paths)


def state_path(out: Path, epoch: int, step: int) -> Path:
    return out.with_name(out.name + ".run") / f"state-{epoch:08d}-{step:08d}.pt"


@pytest.mark.parametrize("keep", [1, 2, 3, 99])
@pytest.mark.parametrize(
    ("save_every", "saved"),
    [
        (None, [(1, 0), (2, 0)]),
        (1, [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]),
        (2, [(0, 2), (1, 0), (1, 2), (2, 0)]),
        (3, [(1, 0), (2, 0)]),  # the last step of an epoch is its end
    ],
)
def test_exactly_the_latest_states_are_kept(
    mnist: Path, train: Train, tmp_path: Path, save_every: int | None, saved: list[tuple[int, int]], keep: int
) -> None:
    how = () if save_every is None else ("--save-every", save_every)
    result = train(*QUICK, *how, "--keep", keep, "--data-dir", mnist, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert states_of(tmp_path / "out") == saved[-keep:]
    for epoch, step in saved[-keep:]:
        state = torch.load(state_path(tmp_path / "out", epoch, step), weights_only=True)
        assert (state["epoch"], state["step"]) == (epoch, step)


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_an_older_state_takes_the_place_of_a_damaged_one(
    mnist: Path, train: Train, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    command = (*QUICK, "--save-every", 2, "--keep", 3, "--data-dir", mnist, "--out", out)
    train(*command)
    weights, losses = (out / "model.safetensors").read_bytes(), [line["loss"] for line in log_of(out)]
    kept = [(1, 0), (1, 2), (2, 0)]
    assert states_of(out) == kept
    for older, latest in ((kept[1], kept[2]), (kept[0], kept[1])):
        path = state_path(out, *latest)
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else b"")
        refused = train(*command)
        assert refused.exit_code == 6
        assert f"{path} is damaged" in refused.output
        assert f"remove it to continue from {state_path(out, *older).name}" in refused.output
        assert (out / "model.safetensors").read_bytes() == weights, "what there is is left alone"
        path.unlink()
    continued = train(*command)
    assert continued.exit_code == 0, continued.output
    assert (out / "model.safetensors").read_bytes() == weights
    assert [line["loss"] for line in log_of(out)] == losses, "each epoch once, every image counted once"
    assert states_of(out) == kept


def test_the_only_state_being_damaged_names_no_other(mnist: Path, train: Train, tmp_path: Path) -> None:
    command = (*QUICK, "--keep", 1, "--data-dir", mnist, "--out", tmp_path / "out")
    train(*command)
    state_path(tmp_path / "out", 2, 0).write_bytes(b"")
    refused = train(*command)
    assert refused.exit_code == 6
    assert "--restart" in refused.output
    assert "remove it to continue" not in refused.output


@pytest.mark.parametrize("option", ["--keep", "--save-every", "--micro-batch", "--certify-every"])
def test_none_of_them_can_be_0(mnist: Path, train: Train, tmp_path: Path, option: str) -> None:
    refused = train(*QUICK, option, 0, "--data-dir", mnist, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert f"{option} must be at least 1" in refused.output


# --tensorboard


def scalars_of(run: Path) -> Counter[tuple[str, int, float]]:
    """(tag, step, value) of all scalars in the event files: length, its checksum, an event, its checksum; repeated."""
    found: Counter[tuple[str, int, float]] = Counter()
    for path in (run / "tensorboard").glob("events.*"):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found.update((value.tag, event.step, value.simple_value) for value in event.summary.value)
            at += 12 + length + 4
        assert at == len(data)
    return found


def logged(run: Path) -> Counter[tuple[str, int, float]]:
    """What the logs say, as it should be shown."""
    found: Counter[tuple[str, int, float]] = Counter()
    for kind, name in (("train", "log.jsonl"), ("certified", "certified.jsonl")):
        for line in map(json.loads, (run / name).read_text().splitlines() if (run / name).exists() else []):
            values = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "epoch"}
            values |= {f"accuracy_at_radius_{r}": value for r, value in line.get("certified", {}).items()}
            found.update((f"{kind}/{key}", line["epoch"], np.float32(value)) for key, value in values.items())
    return found


def session(mnist: Path, out: Path, **options: Any) -> TrainingOptions:
    defaults: dict[str, Any] = {"device": "cpu", "precision": "fp32", "compile_": "off", "threads": 1, "held_out": 0}
    return TrainingOptions("mnist", mnist, out, "gaussian", 0.25, **{**defaults, **options})


def test_every_logged_number_is_shown_once(mnist: Path, train: Train, tmp_path: Path) -> None:
    certified = ("--held-out", 2, "--certify-every", 1, "--tensorboard")
    command = (*QUICK, *certified, "--data-dir", mnist, "--out", tmp_path / "out")
    assert train(*command).exit_code == 0
    shown = scalars_of(tmp_path / "out.run")
    assert shown == logged(tmp_path / "out.run")
    assert set(shown.values()) == {1}
    names = {"train/loss", "train/lr", "train/noisy_correct", "certified/acr", "certified/accuracy_at_radius_0.25"}
    assert {(name, epoch) for name in names for epoch in (0, 1)} <= {(tag, step) for tag, step, _ in shown}
    assert train(*command).exit_code == 0
    assert scalars_of(tmp_path / "out.run") == shown, "a finished run, once more"


@pytest.mark.parametrize("at", [(1, 3), (2, 1)], ids=["after an epoch", "within one"])
def test_an_interrupted_run_shows_every_number_once(mnist: Path, tmp_path: Path, at: tuple[int, int]) -> None:
    options = session(mnist, tmp_path / "out", tensorboard=True, held_out=2, certify_every=2)
    chosen = recipe("mnist", "gaussian", 0.25).with_options(epochs=4, batch=16, lr=0.1)

    def stop(epoch: int, step: int, steps: int, metrics: dict[str, float]) -> None:
        if (epoch, step) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        run_training(options, chosen, progress=stop)
    run = tmp_path / "out.run"
    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    assert scalars_of(run) == logged(run), "what there is can be seen already"
    run_training(options, chosen)
    shown = scalars_of(run)
    assert shown == logged(run)
    assert set(shown.values()) == {1}
    assert {step for tag, step, _ in shown if tag == "train/loss"} == {0, 1, 2, 3}
    assert {step for tag, step, _ in shown if tag == "certified/acr"} == {1, 3}


def test_a_refused_command_leaves_the_curves_as_they_are(mnist: Path, train: Train, tmp_path: Path) -> None:
    command = (*QUICK, "--tensorboard", "--data-dir", mnist, "--out", tmp_path / "out")
    assert train(*command).exit_code == 0
    shown = scalars_of(tmp_path / "out.run")
    assert train(*command, "--seed", 1).exit_code == 6
    assert scalars_of(tmp_path / "out.run") == shown == logged(tmp_path / "out.run")


def test_no_curves_where_none_are_wanted(mnist: Path, train: Train, tmp_path: Path) -> None:
    assert train(*QUICK, "--no-tensorboard", "--data-dir", mnist, "--out", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out.run" / "tensorboard").exists()


def test_curves_without_tensorboardx_are_refused_before_training(
    mnist: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused = train(*QUICK, "--tensorboard", "--data-dir", mnist, "--out", tmp_path / "out")
    assert refused.exit_code == 6
    assert "install it, or use --no-tensorboard" in refused.output
    assert not states_of(tmp_path / "out")


# No waiting for the device


class WaitError(AssertionError):
    pass


class _NoReading(TorchFunctionMode):
    """Raises where values of a tensor are asked for, or a tensor is moved."""

    NAMES = frozenset({"item", "tolist", "numpy", "cpu", "cuda", "__bool__", "__float__", "__int__", "__index__"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        moved = name == "to" and any(isinstance(a, torch.device | str) for a in (*args[1:], *kwargs.values()))
        if name in self.NAMES or moved:
            raise WaitError(name)
        return func(*args, **kwargs)


class _NoSynchronising(TorchDispatchMode):
    """Raises at operations that wait for a GPU: values read, sizes that depend on values, values sent by the host."""

    READ = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal")
    SIZED_BY_VALUES = ("aten.nonzero", "aten.masked_select", "aten.bincount", "aten._unique2", "aten.unique_dim")
    SENT = ("aten.lift_fresh",)
    NAMES = frozenset((*READ, *SIZED_BY_VALUES, *SENT))
    INDEXED = frozenset({"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        indices = args[1] if name in self.INDEXED else ()
        masks = [i for i in indices if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
        if name in self.NAMES or masks or str(func) == "aten.repeat_interleave.Tensor":
            raise WaitError(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.new_tensor(1.0),
        lambda x: torch.tensor(1.0) + x,
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64)),
        lambda x: nn.functional.one_hot(x.long()),
    ],
)
def test_waiting_is_noticed(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(WaitError), _NoReading(), _NoSynchronising():
        read(torch.ones(3))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gaussian", {}),
        ("gaussian", {"label_smoothing": 0.1}),
        ("macer", {}),
        ("macer", {"label_smoothing": 0.1}),
        ("macer", {"defer": 2, "k_deferred": 1}),
        ("smoothadv", {}),
        ("smoothadv", {"attack": "ddn", "label_smoothing": 0.1}),
    ],
)
def test_no_method_waits_for_the_device(method: str, options: dict[str, Any]) -> None:
    model, chosen = lenet(), RECIPES[method].with_options(**options)
    images, labels = digits(model)
    step = Step(0, torch.Generator().manual_seed(1), model)
    with _NoReading(), _NoSynchronising():
        loss, sums = METHOD_FUNCTIONS[method](model, images, labels, chosen, step)
        loss.backward()  # type: ignore[no-untyped-call]
    assert all(isinstance(value, Tensor) for value in sums.values())


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_no_step_waits_for_the_device(tmp_path: Path, method: str, micro_batch: int | None, ema: float) -> None:
    """Batches, update and average, from the second batch of an epoch on (the first sends its order)."""
    chosen = RECIPES[method].with_options(k=1 if method != "gaussian" else None, ema=ema)
    conduct = Conduct(EXACT, micro_batch=micro_batch)
    run = _Run(residual(), chosen, conduct, RunFolder(tmp_path), seed=0)
    batches = iter(DeviceBatches(small_images(21), batch=7, seed=0, device=CPU, limit=None).epoch(0, 0))
    first = next(batches)
    with _NoReading(), _NoSynchronising():
        run.update(*first, 0.1)
        for images, labels, share in batches:
            run.update(images, labels, share, 0.1)
    assert run.step == 3
    assert run.sums["loss"].isfinite()
