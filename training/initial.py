"""The weights that a run starts from: random, from a checkpoint, or from a state-dict file (fine-tuning)."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from macer_serve.architectures import base_classifier
from macer_serve.checkpoint import load_model
from macer_serve.checkpoint.fitting import head_tensors, load_weights
from macer_serve.checkpoint.state_dict import SUFFIXES, read_state_dict
from macer_serve.datasets import DatasetInfo
from macer_serve.errors import ParameterError
from macer_serve.torchvision_networks import with_current_names

_NAMED_AT_MOST = 6  # classes, in a note


@dataclass(frozen=True, slots=True)
class Initial:
    """A model to train, the digest of the file or checkpoint of its weights, and a note to the user."""

    model: nn.Module
    digest: str | None = None
    note: str | None = None


def initial_model(
    architecture: str,
    *,
    classes: tuple[str, ...],
    input_shape: tuple[int, int, int],
    info: DatasetInfo,
    seed: int,
    init: str | None,
) -> Initial:
    """Returns the model with random weights by `seed`, replaced by those that `init` names.

    `init` is a checkpoint or a state-dict file. If the file's network has another number of classes, the head (its
    last layer) stays random and the note says so. Raises `CheckpointError` for a checkpoint or a file that cannot be
    read, `ParameterError` for one that does not fit.
    """
    torch.manual_seed(seed)
    model = base_classifier(architecture, classes=len(classes), input_shape=input_shape, mean=info.mean, std=info.std)
    if init is None:
        return Initial(model)
    path = Path(os.path.expanduser(init))  # unlike Path's, it accepts unknown users and names that are too long
    if os.path.isfile(path) or (path.suffix in SUFFIXES and not os.path.isdir(path)):
        given = read_state_dict(path)
        fresh = _take_file(cast(nn.Sequential, model)[1], given.tensors, init, architecture)
        return Initial(model, given.digest, _note(init, fresh, classes))
    return Initial(model, _take_checkpoint(model, init, architecture, classes, input_shape, info))


def _take_checkpoint(
    model: nn.Module,
    init: str,
    architecture: str,
    classes: tuple[str, ...],
    input_shape: tuple[int, int, int],
    info: DatasetInfo,
) -> str:
    """Gives the model the checkpoint's weights; returns the checkpoint's digest."""
    config, start = load_model(init)
    there, here = (config.architecture, config.mean, config.std), (architecture, info.mean, info.std)
    if there != here or config.classes != classes:
        differing = [f"{a!r} there, {b!r} here" for a, b in zip(config.classes, classes, strict=False) if a != b]
        raise ParameterError(
            f"{init} is {config.architecture} with {len(config.classes)} classes on "
            f"{config.dataset}; this run needs {architecture} with {len(classes)} classes on {info.name}"
            + (f" (classes differ in name, the first: {differing[0]})" if differing else ""),
            settings=("init",),
        )
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError as error:  # a network whose layers depend on the image size
        raise ParameterError(
            f"{init} takes images of {config.input_shape}, this run's are {input_shape}", settings=("init",)
        ) from error
    return config.digest


def _take_file(network: nn.Module, given: OrderedDict[str, Tensor], init: str, architecture: str) -> list[str]:
    """Gives the network the tensors of a file; returns the names of the head's if they are of other classes.

    Raises `ParameterError` naming the tensors that do not fit.
    """
    given = with_current_names(given)
    own, head = network.state_dict(), head_tensors(network)
    fresh = head if _other_classes([(given[name], own[name]) for name in head if name in given]) else []
    given.update((name, own[name]) for name in fresh)
    if wrong := load_weights(network, given):
        raise ParameterError(
            f"{init} does not fit {architecture}: {wrong}. Name the architecture of these weights",
            settings=("init", "arch"),
        )
    return fresh


def _other_classes(head: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the head's tensors, given and own, differ in the number of classes and in nothing else."""
    same_layer = all(given.shape[1:] == own.shape[1:] and given.ndim for given, own in head)
    return bool(head) and same_layer and all(given.shape[0] != own.shape[0] for given, own in head)


def _note(init: str, fresh: list[str], classes: tuple[str, ...]) -> str:
    if fresh:
        return (
            f"{init}: {' and '.join(fresh)} are of another number of classes and were not taken. "
            f"The head of {len(classes)} classes starts from random weights; all other tensors were taken."
        )
    return (
        f"{init}: all tensors were taken, the head included. A state dict does not name its classes: "
        f"its {len(classes)} outputs are taken to be {_listed(list(classes))}, in this order."
    )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
