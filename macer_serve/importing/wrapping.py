"""From a foreign file and the facts it lacks to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from macer_serve.base_classifier import SAME, error_of_batch, kind_of_outputs, probe_pixels
from macer_serve.checkpoint import GRAPH, WEIGHTS, CheckpointConfig, save_checkpoint, write_checkpoint
from macer_serve.checkpoint.config import digest_of
from macer_serve.checkpoint.folder import require_free
from macer_serve.checkpoint.limits import read_bytes
from macer_serve.errors import CheckpointError, EngineError, EngineMismatchError
from macer_serve.importing.facts import Facts
from macer_serve.importing.foreign import Foreign, read_foreign
from macer_serve.locks import locked

Floats = npt.NDArray[np.float32]
Function = Callable[[Floats], Floats]
_PROBE = 3


def import_model(
    file: str | Path,
    out: str | Path,
    facts: Facts,
    *,
    arch: str | None = None,
    denoiser: str | Path | None = None,
) -> CheckpointConfig:
    """Writes a foreign network as a checkpoint folder; returns the configuration as written.

    `facts` complete what the file states, and override it. `arch` names the network of a state dict:
    `torchvision:NAME`. `denoiser` is an ONNX file from pixel values to pixel values, put in front of the network. A
    network that is one of ours keeps its weights; any other becomes an ONNX graph with the normalisation in it.

    Raises `MissingFactsError` for facts that nobody states; `CheckpointError` for a file that is damaged, refused or no
    classifier, and for an `out` that holds other files; `OutputError` for an `out` that cannot be written or is being
    written; `EngineError` if onnxruntime or torch's exporter cannot run the network; `EngineMismatchError` if what
    would be written computes other logits than the original.
    """
    file, out = Path(file), Path(out)
    require_free(out)
    with locked(out):
        return _imported(file, out, facts, arch, None if denoiser is None else Path(denoiser))


def _imported(file: Path, out: Path, facts: Facts, arch: str | None, denoiser: Path | None) -> CheckpointConfig:
    """Writes the checkpoint; see `import_model`."""
    foreign = read_foreign(file, arch)
    facts = facts.filled_from(foreign.facts)
    facts.require_complete(str(file))
    assert facts.sigma is not None
    assert facts.input_shape is not None
    shape = facts.input_shape
    mean, std = facts.normalisation(shape[0])
    front = None if denoiser is None else _load_denoiser(denoiser, shape, facts.sigma)
    original = _composed(front, mean, std, _function(foreign, shape))
    pixels = probe_pixels(_PROBE, shape, facts.sigma)
    logits = original(pixels)
    _require_logits(logits, file)
    classes = facts.class_names(logits.shape[1])
    source = {"format": foreign.format, "file": file.name, "digest": digest_of(read_bytes(file))}
    if arch is not None:
        source["arch"] = arch
    if denoiser is not None:
        source |= {"denoiser": denoiser.name, "denoiser_digest": digest_of(read_bytes(denoiser))}
    ours = foreign.architecture if front is None else None
    config = CheckpointConfig(
        name=facts.name or out.resolve().name,
        architecture=ours or "onnx",
        classes=classes,
        input_shape=shape,
        mean=mean if ours else (0.0,) * shape[0],
        std=std if ours else (1.0,) * shape[0],
        sigma=facts.sigma,
        resize=facts.resize or max(shape[1:]),
        files={WEIGHTS if ours else GRAPH: digest_of(b"")},  # replaced when it is written
        outputs=kind_of_outputs(logits),
        source=source,
        versions=_versions(),
    )
    if ours:
        module = _with_normalisation(foreign.network, mean, std)
        return save_checkpoint(module, config, out)
    graph = _graph(foreign, front, shape, len(classes), mean, std)
    _require_same(graph, original, pixels)
    return write_checkpoint(config, {GRAPH: graph}, out)


def _load_denoiser(path: Path, shape: tuple[int, int, int], sigma: float) -> Any:
    from macer_serve.importing.graphs import require_shape
    from macer_serve.importing.onnx import load_graph

    model = load_graph(path)
    require_shape(model, shape, f"the denoiser {path}")
    pixels = probe_pixels(_PROBE, shape, sigma)
    denoised = _session(model)(pixels)
    if denoised.shape != pixels.shape:
        raise CheckpointError(f"the denoiser {path} returns {list(denoised.shape)} for inputs {list(pixels.shape)}")
    return model


def _function(foreign: Foreign, shape: tuple[int, int, int]) -> Function:
    """Returns the foreign network itself, run plainly: by torch, or by onnxruntime at the batch of its graph."""
    from torch import nn

    if isinstance(foreign.network, nn.Module):
        from macer_serve.voters.torch import plain_logits

        network = foreign.network
        return lambda pixels: plain_logits(network, pixels)
    from macer_serve.importing.graphs import require_shape

    require_shape(foreign.network, shape, "the network")
    return _session(foreign.network)


def _session(model: Any) -> Function:
    """Returns a graph's function, by onnxruntime without optimisations. A fixed batch is filled up and cut."""
    from macer_serve.importing.graphs import batch_of, serialised

    run, batch = _open(serialised(model), model.graph.input[0].name), batch_of(model)

    def by_its_batch(pixels: Floats) -> Floats:
        if batch is None:
            return run(pixels)
        count = -len(pixels) % batch
        filled = np.concatenate([pixels, np.repeat(pixels[-1:], count, axis=0)])
        parts = [run(filled[at : at + batch]) for at in range(0, len(filled), batch)]
        return np.concatenate(parts)[: len(pixels)] if parts[0].ndim and len(parts[0]) == batch else parts[0]

    return by_its_batch


def _open(graph: bytes, name: str) -> Function:
    """Returns the function of a serialised graph, run within bounds on memory and time."""
    from macer_serve.onnx_trial import open_bounded

    bounded = open_bounded(graph, name)

    def run(pixels: Floats) -> Floats:
        output = bounded(pixels)
        if not isinstance(output, np.ndarray) or output.dtype != np.float32:
            kind = output.dtype if isinstance(output, np.ndarray) else type(output).__name__
            raise CheckpointError(f"the graph returns {kind}; float32 logits are needed, not class numbers")
        return output

    return run


def _composed(denoiser: Any | None, mean: Sequence[float], std: Sequence[float], network: Function) -> Function:
    """Returns network((denoiser(pixels) - mean) / std)."""
    denoise: Function = (lambda pixels: pixels) if denoiser is None else _session(denoiser)
    shift, scale = (np.asarray(values, np.float32).reshape(1, -1, 1, 1) for values in (mean, std))
    return lambda pixels: network((denoise(pixels) - shift) / scale)


def _require_logits(logits: Floats, file: Path) -> None:
    """Raise `CheckpointError` unless these are finite logits `[_PROBE, classes]` of at least two classes."""
    if logits.ndim != 2 or len(logits) != _PROBE:
        raise CheckpointError(
            f"{file} returns {list(logits.shape)} for {_PROBE} images; logits [{_PROBE}, classes] are needed"
        )
    if logits.shape[1] < 2:
        raise CheckpointError(f"{file} has one output; a network for two classes must return a logit for each")
    if not np.isfinite(logits).all():
        raise CheckpointError(f"{file} returns values that are not finite: its weights are damaged, or out of range")


def _with_normalisation(network: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    from torch import nn

    from macer_serve.architectures import Normalise

    return nn.Sequential(Normalise(mean, std), network).eval()


def _graph(
    foreign: Foreign,
    denoiser: Any | None,
    shape: tuple[int, int, int],
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> bytes:
    """Returns the base classifier as the bytes of one graph of ours."""
    from torch import nn

    from macer_serve.importing.graphs import joined, serialised
    from macer_serve.onnx_graph import export_graph

    network = foreign.network
    if isinstance(network, nn.Module):
        network = export_graph(network, shape)
    whole = joined(network, shape=shape, classes=classes, mean=mean, std=std, denoiser=denoiser)
    return serialised(whole)


def _require_same(graph: bytes, original: Function, pixels: Floats) -> None:
    """Raise unless the graph gives the original's logits at batches 1, 2 and 3, and the same twice.

    `CheckpointError` if it works at another batch only, `EngineMismatchError` for other logits.
    """
    from macer_serve.onnx_graph import PIXELS

    run, expected = _open(graph, PIXELS), original(pixels)
    if not np.array_equal(original(pixels), expected):
        raise CheckpointError(
            "the network gives other logits when it is run again: it draws random numbers, or was exported for "
            "training. Export it in evaluation mode."
        )
    for batch in range(1, len(pixels) + 1):
        try:
            logits = run(pixels[:batch])
        except EngineError as error:
            raise CheckpointError(
                f"the graph cannot be run on {batch} image(s), it was exported for another batch: export it with a "
                f"dynamic batch dimension ({error})"
            ) from error
        difference = error_of_batch(logits, expected) if logits.shape[:1] == (batch,) else np.inf
        if difference > SAME:
            raise EngineMismatchError(
                f"the network's logits depend on the batch: for {batch} image(s) a class's differ from those of the "
                f"file as it is by {difference:.2g} of how much they vary, and {SAME:g} is allowed. Export it in "
                "evaluation mode, with a dynamic batch."
            )


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import torch

    from macer_serve.version import __version__

    return {
        "macer_serve": __version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
    }
