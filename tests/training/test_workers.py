"""Two workers do what one does: their steps, what they say when stopped, what they refuse, a mistake only one meets."""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from click.testing import Result
from small_runs import CPU, EXACT, RECIPES, log_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from macer_serve.architectures import base_classifier
from macer_serve.datasets import load_dataset
from macer_serve.errors import DataError
from macer_serve.training.data import TreeBatches, _share, generator_for
from macer_serve.training.loop import LoopOptions, _Run
from macer_serve.training.method import Step
from macer_serve.training.methods import METHODS
from macer_serve.training.network import Group
from macer_serve.training.options import Callbacks, TrainingOptions
from macer_serve.training.recipe import Recipe
from macer_serve.training.recipes import recipe
from macer_serve.training.run_state import RunFolder
from macer_serve.training.worker import train_worker

Start = Callable[..., "subprocess.Popen[str]"]
Train = Callable[..., Result]
PATIENCE = 400.0

# Two workers without Ray: steps, and the run that the stopped ones are compared with

SEED, RATE = 3, 0.1
# Shares of 7 and 6 images, then of 1 and none.
SIZES = (13, 1)
CASES = {
    **{method: ("lenet", chosen) for method, chosen in RECIPES.items()},
    "batch norm": ("resnet20", RECIPES["gaussian"]),
}
# An epoch of 126 steps takes longer than workers take to hear of a stop.
RUN = ("--dataset", "mnist", "--method", "macer", "--k", 16, "--lam", 1, "--epochs", 2, "--batch", 8, "--save-every", 9)
HOW = ("--compile", "off", "--precision", "fp32", "--threads", 1, "--no-tensorboard")


def network(arch: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = base_classifier(arch, classes=10, input_shape=(1, 28, 28), mean=(0.5,), std=(0.5,))
    return model.to(memory_format=torch.channels_last)


def batch(arch: str, size: int) -> tuple[Tensor, Tensor]:
    """Random images, and labels of which the untrained network has half right."""
    images = torch.rand((size, 1, 28, 28), generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        labels = network(arch, 0).eval()(images).argmax(1)
    return images, torch.where(torch.arange(size) % 2 == 0, labels, (labels + 1) % 10)


def work(rank: int, folder: Path, data: Path) -> None:
    """One of two processes: two steps of every case, whose initial weights only the first has; then a whole run."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE))
    group = Group(rank, 2)
    for case, (arch, chosen) in CASES.items():
        options = LoopOptions(EXACT, group=group)
        run = _Run(network(arch, seed=rank), chosen, options, RunFolder(folder), SEED)
        after = []
        for size in SIZES:
            images, labels = batch(arch, size)
            mine, share = _share(torch.arange(size), group)
            run.update(images[mine], labels[mine], share, RATE)
            after.append({name: value.clone() for name, value in run.model.state_dict().items()})
        torch.save({"after": after, "sums": group.total(run.sums)}, folder / f"{case}-{rank}.pt")
    how: dict[str, Any] = {"device": "cpu", "precision": "fp32", "compile_": "off", "threads": 1, "held_out": 0}
    options = TrainingOptions("mnist", data, folder / "undisturbed", "macer", 0.25, workers=2, **how)
    chosen = recipe("mnist", "macer", 0.25).with_options(k=16, lam=1.0, epochs=2, batch=8)
    train_worker(options, chosen, group, stop_requested=lambda: False, callbacks=Callbacks())
    dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Workers:
    """What two workers did undisturbed."""

    folder: Path

    def of(self, case: str) -> list[dict[str, Any]]:
        """Of each, the model's state after each step, and the totals over images that it knows at the end."""
        return [torch.load(self.folder / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]

    @property
    def out(self) -> Path:
        return self.folder / "undisturbed"


@pytest.fixture(scope="module")
def workers(long_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Workers:
    folder = tmp_path_factory.mktemp("workers")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(rank, folder, long_mnist), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    return Workers(folder)


def noise_of(step: int, rank: int) -> torch.Generator:
    return generator_for("cpu", SEED, "noise", 0, step, rank)


class NoiseOfBoth(TorchFunctionMode):
    """Gives each image of a whole batch the noise that it has on its worker."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        (shape,) = args
        noise = torch.empty(shape).view(SIZES[self.step], -1, *shape[-3:])
        for rank in (0, 1):
            noise[rank::2] = torch.randn(noise[rank::2].shape, generator=noise_of(self.step, rank))
        return noise.view(shape)


def loss_of(
    model: nn.Module, chosen: Recipe, images: Tensor, labels: Tensor, noise: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    def logits(of: nn.Module, x: Tensor) -> Tensor:
        return of(x.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    step = Step(0, noise, lambda: nullcontext(lambda x: logits(frozen, x)))
    return METHODS[chosen.method].loss(lambda x: logits(model, x), images, labels, chosen, step)


def optimizer_of(model: nn.Module, chosen: Recipe) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), RATE, chosen.momentum, weight_decay=chosen.weight_decay)


def require_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit, after each step."""
    for states in zip(one["after"], other["after"], strict=True):
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["gaussian", "macer", "smoothadv"])
def test_two_workers_take_the_steps_of_one(workers: Workers, method: str) -> None:
    """Of one that passes each batch whole, every image with its noise; and they count every image once."""
    arch, chosen = CASES[method]
    first, second = workers.of(method)
    require_alike(first, second)
    model, counted = network(arch, seed=0), dict[str, float]()
    optimizer = optimizer_of(model, chosen)
    for step, size in enumerate(SIZES):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        with NoiseOfBoth(step):
            loss, sums = loss_of(model, chosen, *batch(arch, size), torch.Generator())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        counted = {name: counted.get(name, 0.0) + value.item() for name, value in sums.items()}
        for name, value in model.state_dict().items():
            assert (value - before[name]).abs().max() > 1e-4, "a step that can be told from rounding"
            torch.testing.assert_close(first["after"][step][name], value, rtol=0, atol=1e-6)
    assert {name: value.item() for name, value in first["sums"].items()} == pytest.approx(counted, rel=1e-5)
    assert second["sums"] == {}


@pytest.mark.usefixtures("one_thread")
def test_statistics_of_batch_norm_are_the_mean_over_workers(workers: Workers) -> None:
    """In proportion to the shares, as gradients are: a worker for which no image was left leaves nothing in them."""
    arch, chosen = CASES["batch norm"]
    first, second = workers.of("batch norm")
    require_alike(first, second)
    model = network(arch, seed=0)
    optimizer = optimizer_of(model, chosen)
    for step, size in enumerate(SIZES):
        images, labels = batch(arch, size)
        own, shares = [copy.deepcopy(model), copy.deepcopy(model)], list[float]()
        for rank in (0, 1):
            mine, share = _share(torch.arange(size), Group(rank, 2))
            loss, _ = loss_of(own[rank], chosen, images[mine], labels[mine], noise_of(step, rank))
            loss.backward()  # type: ignore[no-untyped-call]
            shares.append(share)
        assert shares == [(size + 1) // 2 / size, size // 2 / size]
        for name, parameter in model.named_parameters():
            gradients = [one.get_parameter(name).grad for one in own]
            assert gradients[0] is not None
            assert gradients[1] is not None
            parameter.grad = shares[0] * gradients[0] + shares[1] * gradients[1]
        for name, statistic in model.named_buffers():
            ones = [one.get_buffer(name) for one in own]
            if name.endswith("num_batches_tracked"):
                statistic.copy_(ones[0])
            elif "running" in name:
                assert not torch.allclose(ones[0], ones[1], rtol=1e-4), "each worker has its own images"
                statistic.copy_(shares[0] * ones[0] + shares[1] * ones[1])
        optimizer.step()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(first["after"][step][name], value, rtol=1e-5, atol=1e-6)


# Whole runs, by Ray


@dataclass(frozen=True, slots=True)
class Run:
    """A `macer train` with two workers, of which no process is left."""

    out: Path
    code: int
    output: str

    @property
    def said(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("macer: ")]


def folder_of(out: Path) -> Path:
    return out.with_name(out.name + ".run")


def states_of(out: Path) -> list[str]:
    return sorted(path.name for path in folder_of(out).glob("state-*.pt"))


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder_of(out).iterdir()}


def processes_of(session: int) -> list[int]:
    """Ray gives its workers groups of their own, but no sessions."""
    found = []
    for pid in psutil.pids():
        try:
            found += [pid] * (os.getsid(pid) == session)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def wait_for_state(process: subprocess.Popen[str], out: Path, after: str) -> str:
    """The latest state, as soon as it is later than `after`; the process must not end before."""
    while not (states := states_of(out)) or states[-1] <= after:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return states[-1]


def finished(process: subprocess.Popen[str], out: Path) -> Run:
    output, _ = process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while processes_of(process.pid):
        assert time.monotonic() < deadline, output
        time.sleep(0.01)
    assert "Traceback" not in output
    return Run(out, process.returncode, output)


def begin(start: Start, data: Path, out: Path) -> subprocess.Popen[str]:
    return start(*RUN, *HOW, "--workers", 2, "--data-dir", data, "--out", out)


@pytest.fixture(scope="module")
def stopped(long_mnist: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Asked to stop by SIGTERM, as soon as something of the first epoch was saved."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    process = begin(start, long_mnist, out)
    wait_for_state(process, out, after="")
    process.send_signal(signal.SIGTERM)
    return finished(process, out)


def test_sigterm_stops_two_workers_within_an_epoch_and_saves(stopped: Run) -> None:
    assert stopped.code == 143, stopped.output
    state = torch.load(folder_of(stopped.out) / states_of(stopped.out)[-1], weights_only=True)
    assert (state["epoch"], state["step"] > 0) == (0, True), "the signal was meant to arrive within an epoch"
    at = f"macer: stopped at epoch 1, step {state['step']}; the state is saved. Run the same command again to continue."
    assert stopped.said == [at]
    assert not stopped.out.exists()


def test_a_run_stopped_twice_ends_at_the_weights_of_an_undisturbed_one(
    workers: Workers, stopped: Run, long_mnist: Path, start: Start, tmp_path: Path
) -> None:
    """By SIGTERM, then by Ctrl-C, which a terminal sends to the whole group: Ray's own processes get it, too."""
    out = tmp_path / "out"
    shutil.copytree(folder_of(stopped.out), folder_of(out))
    process = begin(start, long_mnist, out)
    saved = wait_for_state(process, out, after=states_of(out)[-1])
    os.killpg(process.pid, signal.SIGINT)
    again = finished(process, out)
    assert again.code == 143, again.output
    assert len(again.said) == 1
    assert again.said[0].endswith("; the state is saved. Run the same command again to continue.")
    assert states_of(out)[-1] > saved
    assert not out.exists()
    last = finished(begin(start, long_mnist, out), out)
    assert last.code == 0, last.output
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, workers.out)]
    assert weights[0] == weights[1]
    assert [line["epoch"] for line in log_of(out)] == [0, 1]
    losses = [[line["loss"] for line in log_of(folder)] for folder in (out, workers.out)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12), "an interrupted epoch counts every image once"


def workers_below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray Train's workers that this run started."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "RayTrainWorker" in " ".join(child.cmdline())]


def test_a_killed_worker_costs_nothing_that_was_saved(
    workers: Workers, long_mnist: Path, start: Start, tmp_path: Path
) -> None:
    """kill -9 within the second epoch: the run ends at the weights of an undisturbed one, each epoch logged once."""
    out = tmp_path / "out"
    process = begin(start, long_mnist, out)
    wait_for_state(process, out, after="state-00000001-00000000.pt")
    logged = log_of(out)[:1]
    both = workers_below(process)
    assert len(both) == 2
    both[1].kill()
    killed = finished(process, out)
    assert killed.code == 0, killed.output
    assert "all continue from the last saved state" in killed.output
    assert [line["epoch"] for line in log_of(out)] == [0, 1]
    assert log_of(out)[:1] == logged, "what was saved was not done again"
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, workers.out)]
    assert weights[0] == weights[1]


def test_one_worker_does_not_continue_a_run_of_two(
    stopped: Run, long_mnist: Path, train: Train, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder_of(stopped.out), folder_of(out))
    before = files_of(out)
    refused = train(*RUN, "--data-dir", long_mnist, "--out", out)
    assert refused.exit_code == 6
    assert "holds a run with other settings: workers was 2, now 1. Use the same settings" in refused.output
    assert "Traceback" not in refused.output
    assert files_of(out) == before


def test_two_workers_do_not_continue_a_run_of_one(mnist: Path, start: Start, train: Train, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("--dataset", "mnist", "--method", "gaussian", "--epochs", 1, "--data-dir", mnist, "--out", out)
    assert train(*command).exit_code == 0
    before = files_of(out)
    refused = finished(start(*command, *HOW, "--workers", 2), out)
    assert refused.code == 6, refused.output
    assert len(refused.said) == 1, "at once, and not after trying again"
    assert "holds a run with other settings: workers was 1, now 2. Use the same settings" in refused.said[0]
    assert files_of(out) == before


def test_an_image_that_one_of_two_workers_cannot_read_ends_the_run_as_it_does_one_worker(
    tree: Path, start: Start, train: Train, tmp_path: Path
) -> None:
    """At once, while the other waits for its gradients."""
    images = load_dataset("imagenet", tree, "train")
    order = torch.randperm(len(images), generator=generator_for("cpu", 0, "order", 0))
    broken = Path(images.source.samples[order[1]][0])
    broken.write_bytes(broken.read_bytes()[:-2000])
    how: dict[str, Any] = {"size": 32, "batch": 4, "seed": 0, "device": CPU, "loaders": 0, "limit": None}
    assert list(TreeBatches(images, **how, group=Group(0, 2)).epoch(0, 0))
    with pytest.raises(DataError):
        list(TreeBatches(images, **how, group=Group(1, 2)).epoch(0, 0))
    command = ("--dataset", "imagenet", "--data-dir", tree, "--size", 32, "--arch", "lenet", "--batch", 4, "--k", 1)
    alone = train(*command, "--epochs", 1, "--out", tmp_path / "alone")
    assert alone.exit_code == 4
    both = finished(start(*command, *HOW, "--epochs", 1, "--workers", 2, "--out", tmp_path / "both"), tmp_path / "both")
    assert both.code == 4, both.output
    assert "image files cannot be read" in both.said[0]
    assert str(broken) in both.output
    assert both.said == [line for line in alone.output.splitlines() if line.startswith("macer: ")]
    assert "lost workers" not in both.output, "it is not tried again"
    assert not both.out.exists()
