"""No step of training waits for the device, from the second batch of an epoch on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import CPU, EXACT, RECIPES, digits, lenet, residual, small_images
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from macer_serve.training.data import DeviceBatches
from macer_serve.training.loop import LoopOptions, _Run
from macer_serve.training.method import Step
from macer_serve.training.methods import METHODS
from macer_serve.training.run_state import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


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
    step = Step(0, torch.Generator().manual_seed(1), lambda: nullcontext(model))
    with _NoReading(), _NoSynchronising():
        loss, sums = METHODS[method].loss(model, images, labels, chosen, step)
        loss.backward()  # type: ignore[no-untyped-call]
    assert all(isinstance(value, Tensor) for value in sums.values())


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_no_step_waits_for_the_device(tmp_path: Path, method: str, micro_batch: int | None, ema: float) -> None:
    """Batches, update and average, from the second batch of an epoch on (the first sends its order)."""
    chosen = RECIPES[method].with_options(k=1 if method != "gaussian" else None, ema=ema)
    options = LoopOptions(EXACT, micro_batch=micro_batch)
    run = _Run(residual(), chosen, options, RunFolder(tmp_path), seed=0)
    batches = iter(DeviceBatches(small_images(21), batch=7, seed=0, device=CPU, limit=None).epoch(0, 0))
    first = next(batches)
    with _NoReading(), _NoSynchronising():
        run.update(*first, 0.1)
        for images, labels, share in batches:
            run.update(images, labels, share, 0.1)
    assert run.step == 3
    assert run.sums["loss"].isfinite()
