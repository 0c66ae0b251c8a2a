"""TorchVoter: a PyTorch base classifier at a fixed batch shape, as fast as the machine allows.

What makes it fast: bf16 where the hardware multiplies it, channels-last (a permuted NHWC tensor, no copy),
batch normalisation folded, Inductor with frozen weights on the CPU and CUDA graphs on a GPU, one
single-threaded pass per core, argmax and counting on the device, one synchronisation a pass.

What keeps it sound: the network is fixed before the noise is drawn, the last layer is in fp32, short batches
are padded to the one shape, and no statistic of a batch enters its votes. Any such function may be certified.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from macer_serve.errors import EngineError, ParameterError
from macer_serve.hardware import multiplies_bf16, pick_device, usable_cores
from macer_serve.smoothing.certification import Draw
from macer_serve.smoothing.noise import LATTICE_STEPS, ExactNoise, NoiseKind, noise_for
from macer_serve.smoothing.proof import SOFT_LEVELS, Votes
from macer_serve.voters import Task

log = logging.getLogger(__name__)

Precision = Literal["auto", "bf16", "fp32"]
_PROBE_SEED = hashlib.sha256(b"macer-serve probe").digest()[:16]


class _Features(nn.Module):
    """Noisy copies as the noise stream makes them, `[k, H, W, C]` -> the last layer's input `[k, features]`, fp32."""

    def __init__(self, model: nn.Sequential, *, scale: float, bf16: bool) -> None:
        super().__init__()
        self.normalise, network = model[0], _folded(model[1])
        self.scale, self.bf16 = scale, bf16
        last = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
        parent, _, attribute = last.rpartition(".")
        # The last layer stays outside what is compiled: Inductor packs an fp32 linear layer into a kernel whose
        # last bits depend on a row's position in the batch, and argmax must not see ties made by bf16.
        layer = cast(nn.Linear, network.get_submodule(last))
        self.last = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.last.load_state_dict(layer.float().state_dict())
        setattr(network.get_submodule(parent), attribute, nn.Identity())
        self.network = network.to(torch.bfloat16 if bf16 else torch.float32).to(memory_format=torch.channels_last)

    def forward(self, copies: Tensor) -> Tensor:
        x = self.normalise(copies.permute(0, 3, 1, 2).float() * self.scale)
        return self.network(x.to(torch.bfloat16) if self.bf16 else x).float()  # type: ignore[no-any-return]


def _folded(network: nn.Module) -> nn.Module:
    """A copy of the network with every batch normalisation folded into the convolution before it."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(network)
    except Exception as error:  # fx cannot trace every forward; unfolded is the same function, slower
        log.warning("batch normalisation is not folded (%s): the voter will be slower", error)
        return copy.deepcopy(network)


def _default_batch(device: torch.device, shape: tuple[int, int, int]) -> int:
    """Copies a pass: 50-150 ms of one core, or enough to fill a GPU. Static, so that replicas agree."""
    small = shape[1] * shape[2] <= 64 * 64
    if device.type == "cuda":
        return 4096 if small else 512
    return 256 if small else 16


class TorchVoter:
    """Votes of one base classifier (`model[0]` its normalisation, `model[1]` the network, in eval mode).

    `noise` is `exact` or `gaussian`; `batch` the fixed number of copies a pass; `workers` the CPU cores used,
    one pass each (default: all); `compile=False` skips compilation. Warm-up happens here: the voter is ready,
    and its `engine` proved, when the constructor returns. Raises `EngineError` where it cannot be.
    """

    def __init__(
        self,
        model: nn.Sequential,
        *,
        input_shape: tuple[int, int, int],
        sigma: float,
        noise: NoiseKind = "exact",
        device: str | None = None,
        batch: int | None = None,
        workers: int | None = None,
        precision: Precision = "auto",
        compile: bool = True,
    ) -> None:
        self.device = pick_device(device)
        on_cpu = self.device.type == "cpu"
        self.step = batch if batch is not None else _default_batch(self.device, input_shape)
        self.workers = (workers or usable_cores()) if on_cpu else 1
        if self.step < 1 or self.workers < 1:
            raise ParameterError("a voter needs a batch and a number of workers of at least 1")
        self.input_shape = (input_shape[1], input_shape[2], input_shape[0])
        self.noise = noise_for(noise, sigma)
        has_bf16 = multiplies_bf16(self.device)
        if precision == "auto" and not has_bf16:
            log.warning("no bf16 arithmetic on this hardware: falling back to fp32")
        bf16 = has_bf16 if precision == "auto" else precision == "bf16"
        scale = 1.0 / LATTICE_STEPS if isinstance(self.noise, ExactNoise) else 1.0
        eager = _Features(model.eval(), scale=scale, bf16=bf16).eval().to(self.device)
        self._last = eager.last
        self._local = threading.local()
        # Threads of an outer pool would each start an inner one; one thread a pass, one pass a core.
        if on_cpu:
            torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.workers, "voter", initializer=self._start_worker)
        self.classes = eager.last.out_features
        self._features: Callable[[Tensor], Tensor] = eager
        compiled = compile and self._compile(eager)
        if compiled and self._fingerprint() is None:
            log.warning("compiled, this network's logits depend on a row's position: running uncompiled, slower")
            self._features, compiled = eager, False
        fingerprint = self._fingerprint()
        if fingerprint is None:
            self.close()
            raise EngineError(
                "this voter's logits depend on a row's position in the batch or on the worker; its votes could "
                "not be repeated. Try precision fp32, or another batch."
            )
        kind = "-".join(
            [
                f"torch-{self.device.type}",
                "bf16" if bf16 else "fp32",
                *(["compiled"] if compiled else []),
                *(["t1"] if on_cpu else []),
                f"b{self.step}",
            ]
        )
        self.engine = f"{kind}:{fingerprint}"
        log.info("voter ready: %s, %d workers", self.engine, self.workers)

    def submit(self, tasks: Sequence[Task]) -> Future[list[Votes]]:
        """The votes of each task, hard or soft, when counted; tasks of up to `step` copies in all share one pass.

        Raises `ParameterError` for an input of another shape: broadcast, its pixels would share their noise.
        """
        for task in tasks:
            if task.x.shape != self.input_shape:
                raise ParameterError(f"this voter takes inputs of shape {self.input_shape}, not {task.x.shape}")
        return self._pool.submit(self._count, tuple(tasks))

    def close(self) -> None:
        """Let running passes end, drop waiting ones."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TorchVoter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_worker(self) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        self._local.buffer = np.zeros((self.step, *self.input_shape), dtype=self.noise.dtype)

    def _compile(self, eager: nn.Module) -> bool:
        """Compile, once, in a worker, through the very function that will serve; False where that fails."""
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
        # It says on every CPU that there is no CUDA.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        if self.device.type == "cuda":
            options["mode"] = "reduce-overhead"  # CUDA graphs
        self._features = torch.compile(eager, **options)

        def warm_up() -> None:
            # (These settings belong to the thread.) Every voter of a process counts as a recompilation of the same
            # code; by default the ninth would run uncompiled.
            limits = dynamo.patch(recompile_limit=1000, fail_on_recompile_limit_hit=True)
            with inductor.patch(freezing=True), limits:
                self._run(self._probe())

        try:
            self._pool.submit(warm_up).result()
        except Exception as error:  # no compiler, an unsupported operation: the uncompiled pass is the same function
            reason = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("torch.compile is not available here (%s): running uncompiled, slower", reason[0])
            self._features = eager
            return False
        return True

    def _probe(self) -> npt.NDArray[Any]:
        """A full batch of noisy copies of a mid-grey ramp: different rows, the same for every replica."""
        ramp = np.arange(int(np.prod(self.input_shape)), dtype=np.int32) % 256
        x = (ramp << 18).reshape(self.input_shape)
        return self.noise.sample(x, _PROBE_SEED, "selection", 0, self.step)

    def _fingerprint(self) -> str | None:
        """16 hex digits of the logits of the probe batch, by every worker, rows in order, permuted, and half replaced.

        None where rows or workers do not agree bit for bit: votes would then depend on the batch they were
        computed in, or on each other, and could be neither repeated nor moved.
        """
        probe = self._probe()
        order = np.random.Generator(np.random.PCG64(0)).permutation(self.step)
        kept = np.arange(self.step) % 2 == 0
        other_mates = np.where(kept[:, None, None, None], probe, np.zeros_like(probe))
        ready = threading.Barrier(self.workers)

        def on_one_worker() -> tuple[bytes, ...]:
            ready.wait(timeout=600)  # so that each worker takes one of the probes
            permuted = np.empty((self.step, self.classes), dtype=np.float32)
            permuted[order] = self._run(probe[order]).cpu().numpy()
            plain = self._run(probe).cpu().numpy()
            mixed = self._run(other_mates).cpu().numpy()
            mixed[~kept] = plain[~kept]
            return plain.tobytes(), permuted.tobytes(), mixed.tobytes()

        proofs = [self._pool.submit(on_one_worker) for _ in range(self.workers)]
        outputs = {output for proof in proofs for output in proof.result()}
        return hashlib.sha256(outputs.pop()).hexdigest()[:16] if len(outputs) == 1 else None

    def _run(self, copies: npt.NDArray[Any]) -> Tensor:
        """Logits `[step, classes]` on the device; always in inference mode, always from an ordinary tensor.

        Grad mode belongs to the thread, and a frozen graph meets it as a guard: one function for warm-up and
        service is what keeps them the same.
        """
        with torch.inference_mode():
            tensor = torch.from_numpy(copies)
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                tensor = tensor.pin_memory().to(self.device, non_blocking=True)
            return self._last(self._features(tensor))  # type: ignore[no-any-return]

    def _count(self, tasks: tuple[Task, ...]) -> list[Votes]:
        """The votes of each task, a pass of `step` copies after the other."""
        hard = torch.zeros((len(tasks) + 1) * self.classes, dtype=torch.int64, device=self.device)
        soft = {
            i: np.zeros((self.classes, SOFT_LEVELS), dtype=np.int64)
            for i, task in enumerate(tasks)
            if task.draw.beta is not None
        }
        pieces = [(i, part) for i, task in enumerate(tasks) for part in task.draw.cut(self.step)]
        batch: list[tuple[int, Draw]] = []
        filled = 0
        for i, piece in pieces:
            if filled + len(piece) > self.step:
                self._pass(tasks, batch, hard, soft)
                batch, filled = [], 0
            batch.append((i, piece))
            filled += len(piece)
        if batch:
            self._pass(tasks, batch, hard, soft)
        counted = hard.cpu().numpy().reshape(len(tasks) + 1, self.classes)
        return [soft[i] if i in soft else counted[i].copy() for i in range(len(tasks))]

    def _pass(
        self, tasks: tuple[Task, ...], batch: list[tuple[int, Draw]], hard: Tensor, soft: dict[int, Votes]
    ) -> None:
        """One forward pass over pieces of draws, added to the votes; rows of padding are counted apart."""
        owner = np.full(self.step, len(tasks), dtype=np.int64)
        at, rows = 0, {}
        for i, piece in batch:
            rows[i] = slice(at, at + len(piece))
            owner[rows[i]] = i
            at += len(piece)
        at = 0
        for task, draw in _joined([(tasks[i], piece) for i, piece in batch]):
            self._local.buffer[at : at + len(draw)] = self.noise.sample(
                task.x, task.seed, draw.purpose, draw.start, draw.stop
            )
            at += len(draw)
        logits = self._run(self._local.buffer)
        slots = torch.from_numpy(owner * self.classes).to(self.device, non_blocking=True) + logits.argmax(1)
        hard.scatter_add_(0, slots, torch.ones_like(slots))
        for i, piece in batch:
            if piece.beta is not None:
                soft[i] += self._histogram(logits[rows[i]], piece.beta)

    def _histogram(self, logits: Tensor, beta: float) -> Votes:
        """How many rows give each class a softmax(beta logits) of each level: int64 `[classes, SOFT_LEVELS]`."""
        with torch.inference_mode():
            levels = (torch.softmax(beta * logits, 1) * SOFT_LEVELS).long().clamp_(max=SOFT_LEVELS - 1)
            slots = levels + torch.arange(self.classes, device=logits.device) * SOFT_LEVELS
            counts = torch.bincount(slots.flatten(), minlength=self.classes * SOFT_LEVELS)
        votes: Votes = counts.cpu().numpy().reshape(self.classes, SOFT_LEVELS)
        return votes


def _joined(pieces: list[tuple[Task, Draw]]) -> list[tuple[Task, Draw]]:
    """Pieces of one stream that follow each other as one: a run's looks cut its draws finely, noise need not be."""
    joined: list[tuple[Task, Draw]] = []
    for task, draw in pieces:
        if joined:
            last, before = joined[-1]
            same = last.x is task.x and (last.seed, before.purpose) == (task.seed, draw.purpose)
            if same and before.stop == draw.start:
                joined[-1] = (last, replace(before, stop=draw.stop))
                continue
        joined.append((task, draw))
    return joined
