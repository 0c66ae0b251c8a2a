"""The torch engine: a PyTorch module as fast as the machine allows.

Batch normalisation is folded into convolutions, convolutions run in bf16 if the hardware multiplies it, Inductor
compiles with frozen weights on the CPU and with CUDA graphs on a GPU. Each CPU pass has one thread.

The last layer runs in fp32 outside what is compiled, if its output is the network's output: bf16 logits would tie, and
Inductor packs an fp32 linear layer into a kernel whose last bits depend on a row's position in the batch.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from macer_serve.base_classifier import BaseClassifier, relative_error
from macer_serve.errors import EngineError, first_line
from macer_serve.hardware import multiplies_bf16, pick_device
from macer_serve.voters.copies import device_copies
from macer_serve.voters.engines import Copies, Logits, Passes, require
from macer_serve.voters.options import VoterOptions

log = logging.getLogger(__name__)

# Of `relative_error`. What torch is given to run is compared in fp32 beforehand: bf16 need not be judged finely.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}


def open_engines(classifier: BaseClassifier, options: VoterOptions, passes: Passes) -> Iterator[TorchEngine]:
    """Yields the compiled engine, then the same uncompiled. Raises `EngineError` for a device that is not there."""
    require(options, devices=("cpu", "cuda"), precisions=("fp32", "bf16"))
    device = pick_device(options.device)
    plain = classifier.module()
    probe = _probe(classifier.input_shape)
    folded = _folded(plain)
    if not _same_function(folded, plain, probe):  # fx follows neither hooks of the network nor some tests of types
        log.warning("folding batch normalisation would change this network: it runs as it is, slower")
        folded = copy.deepcopy(plain)
    features, head = split_head(folded, probe) or (folded, None)
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device) else "fp32"
        if precision == "fp32":
            log.warning("no bf16 arithmetic on this hardware: falling back to fp32")
        elif head is None:
            log.warning("this network does not end in a linear layer, which would stay in fp32: all of it runs in fp32")
            precision = "fp32"
    for compiled in (True, False) if options.compile else (False,):
        yield TorchEngine(plain, copy.deepcopy(features), copy.deepcopy(head), device, precision, compiled, passes)


class TorchEngine:
    """The logits of `head(features(pixels))`; see `macer_serve.voters.engines.Engine`."""

    build = None

    def __init__(
        self,
        plain: nn.Module,
        features: nn.Module,
        head: nn.Module | None,
        device: torch.device,
        precision: str,
        compiled: bool,
        passes: Passes,
    ) -> None:
        self.device, self.precision, self.compiled = device.type, precision, compiled
        self.tolerance = TOLERANCE[precision]
        self.source = device_copies(passes.noise, passes.shape, device.type)
        self._device, self._plain = device, plain
        pixels = _Pixels(features, scale=passes.scale, bf16=precision == "bf16").eval().to(device)
        self._head = nn.Identity() if head is None else head.float().to(device)
        self._features = pixels
        self._graphs: dict[int, CompiledGraph] = {}
        self._settings: tuple[Any, ...] | None = None
        self._compiling = threading.Lock()
        if device.type == "cpu":
            torch.set_num_threads(1)

    def start_thread(self) -> None:
        # Threads of an outer pool would each start an inner one: one thread per pass, one pass per core.
        if self.device == "cpu":
            torch.set_num_threads(1)

    def logits(self, copies: Copies) -> Logits:
        if self._settings is not None and self._settings != _global_settings():
            raise EngineError(
                "torch's global settings were changed after this voter was warmed up (deterministic algorithms, "
                "matmul precision or the like): it would compute another function. Restore them, or open a new voter."
            )
        try:
            with torch.inference_mode():  # it belongs to the thread
                made = copies if isinstance(copies, Tensor) else torch.from_numpy(np.ascontiguousarray(copies))
                tensor = made.to(self._device)
                features = self._compiled(tensor) if self.compiled else self._features(tensor)
                logits: Logits = self._head(features).float().cpu().numpy()
        except EngineError:
            raise
        except Exception as error:
            how = "compiled by torch.compile" if self.compiled else "run by torch"
            raise EngineError(f"the network cannot be {how} here: {first_line(error)}") from error
        return logits

    def _compiled(self, copies: Tensor) -> Tensor:
        """Returns the features by the graph compiled for this batch size; it is compiled at warm-up only."""
        if len(copies) not in self._graphs:
            if self._settings is not None:
                raise EngineError(
                    f"this voter has no compiled graph for {len(copies)} copies: after warm-up none is compiled, "
                    "since it could be another function under the same name"
                )
            with self._compiling:  # one thread compiles, the others wait for its graph
                if len(copies) not in self._graphs:
                    self._graphs[len(copies)] = CompiledGraph(self._features, copies)
        return self._graphs[len(copies)](copies)

    def plain_logits(self, pixels: npt.NDArray[np.float32]) -> Logits:
        return plain_logits(self._plain, pixels)

    def seal(self) -> None:
        self._settings = _global_settings()


class CompiledGraph:
    """A module compiled by Inductor for inputs of one shape, without dynamo's guards.

    Dynamo compiles again, silently, when a guard fails: at a new shape, a changed global of torch, another grad mode,
    and once in some 40,000 passes of two threads without any of these, for a reason that is not known. The new code may
    be another function. Here dynamo only captures the graph, at warm-up; what runs afterwards is Inductor's
    code itself, which refuses other shapes.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        # It says on every CPU that there is no CUDA.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        calls: list[tuple[Callable[..., Any], list[Any]]] = []
        cuda = example.device.type == "cuda"

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            from torch._inductor.compile_fx import compile_fx

            code = cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=_CUDA_GRAPHS if cuda else None))

            def recorded(*arguments: Any) -> Any:
                calls.append((code, list(arguments)))
                return code(*arguments)

            return recorded

        compiled = torch.compile(module, backend=backend, dynamic=False, fullgraph=True)
        # Dynamo reads `freezing`, too. All voters share its limit of recompilations, beyond which it would give up.
        with (
            inductor.patch(freezing=not cuda),
            dynamo.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20),
        ):
            expected = compiled(example)
        if len(calls) != 1:
            raise EngineError(f"torch.compile made {len(calls)} graphs of this network, not one")
        self._code, self._arguments = calls[0]
        # Weights that are not frozen into the code are arguments, too.
        places = [i for i, argument in enumerate(self._arguments) if argument is example]
        if len(places) != 1:
            raise EngineError("torch.compile does not pass the network's input on as it is")
        self._place = places[0]
        if not torch.equal(self(example), expected):
            raise EngineError("the code that torch.compile made gives other features than it returned")

    def __call__(self, copies: Tensor) -> Tensor:
        if copies.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        arguments = [*self._arguments]
        arguments[self._place] = copies
        (features,) = self._code(*arguments)
        return features  # type: ignore[no-any-return]


_CUDA_GRAPHS = {"triton.cudagraphs": True}


class _Pixels(nn.Module):
    """Noisy copies as the noise draws them, `[k, H, W, C]` -> the network's output, fp32."""

    def __init__(self, network: nn.Module, *, scale: float, bf16: bool) -> None:
        super().__init__()
        self.network, self.scale, self.bf16 = network.to(memory_format=torch.channels_last), scale, bf16

    def forward(self, copies: Tensor) -> Tensor:
        pixels = copies.permute(0, 3, 1, 2).float() * self.scale
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(pixels).float()  # type: ignore[no-any-return]


def plain_logits(module: nn.Module, pixels: npt.NDArray[np.float32]) -> Logits:
    """Returns the module's logits of pixels `[k, C, H, W]`, in fp32 and uncompiled.

    Raises `EngineError` for a module that cannot run on them or returns something else than a tensor.
    """
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    try:
        with torch.inference_mode():
            output = module(torch.from_numpy(pixels).to(device))
    except Exception as error:
        raise EngineError(f"the network cannot be run on inputs {list(pixels.shape)}: {first_line(error)}") from error
    if not isinstance(output, Tensor):
        raise EngineError(f"the base classifier must return a tensor of logits, not {type(output).__name__}")
    return output.float().cpu().numpy()


def split_head(network: nn.Module, probe: Tensor) -> tuple[nn.Module, nn.Linear] | None:
    """Returns the network without its last linear layer, and that layer; None if there is no such layer.

    The layer is split off only if its output is the network's output, unchanged, as forward hooks on a run of the probe
    `[k, C, H, W]` show, and if both parts together give the same logits bit for bit.
    """
    calls: list[tuple[str, Tensor, int]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            calls.append((name, output, output._version))

        return hook

    hooks = [
        layer.register_forward_hook(record(name))
        for name, layer in network.named_modules()
        if type(layer) is nn.Linear and name
    ]
    try:
        with torch.no_grad():  # not inference mode, whose tensors do not count changes in place
            output = network(probe)
    except Exception as error:
        raise EngineError(f"the network cannot be run on inputs {list(probe.shape)}: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not calls or not isinstance(output, Tensor) or output.ndim != 2:
        return None
    name, last, version = calls[-1]
    if last is not output or output._version != version or [called for called, *_ in calls].count(name) != 1:
        return None
    features = copy.deepcopy(network)
    head = features.get_submodule(name)
    parent, _, attribute = name.rpartition(".")
    setattr(features.get_submodule(parent), attribute, nn.Identity())
    try:
        with torch.no_grad():
            same = torch.equal(head(features(probe)), output)
    except Exception:  # its weights are used elsewhere, too
        return None
    return (features, head) if same and isinstance(head, nn.Linear) else None


def _folded(module: nn.Module) -> nn.Module:
    """Returns a copy of the module with every batch normalisation folded into the convolution before it."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(module).eval()
    except Exception as error:  # fx cannot trace every forward; unfolded is the same function, slower
        log.warning("batch normalisation is not folded (%s): the voter will be slower", first_line(error))
        return copy.deepcopy(module)


def _same_function(module: nn.Module, plain: nn.Module, probe: Tensor) -> bool:
    """Returns whether two modules give the same logits of the probe in fp32, but for rounding."""
    pixels = probe.numpy()
    try:
        logits = plain_logits(module, pixels)
    except EngineError:
        return False
    expected = plain_logits(plain, pixels)
    return expected.ndim != 2 or relative_error(logits, expected) <= TOLERANCE["fp32"]


def _probe(input_shape: tuple[int, int, int]) -> Tensor:
    """Returns eight inputs of uniform pixels beyond [0, 1], as noisy copies have them."""
    return torch.rand(8, *input_shape, generator=torch.Generator().manual_seed(0)) * 3 - 1


def _global_settings() -> tuple[Any, ...]:
    """Returns torch's global settings that choose among kernels, and so among functions."""
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer interface, in parts
        matmul = "mixed"
    newer = ("fp32_precision", "mkldnn.fp32_precision", "mkldnn.conv.fp32_precision", "mkldnn.matmul.fp32_precision")
    return (
        torch.are_deterministic_algorithms_enabled(),
        matmul,
        *(_setting(name) for name in newer),
        torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_default_dtype(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        _setting("cudnn.conv.fp32_precision"),
        _setting("cuda.matmul.fp32_precision"),
    )


def _setting(name: str) -> Any:
    """Returns a precision of `torch.backends`; None for full fp32, or if this version of torch has no such setting."""
    value: Any = torch.backends
    for part in name.split("."):
        value = getattr(value, part, None)
    return None if value in ("none", "ieee") else value
