"""The training methods by name. A new method is one new file and one line here.

Files of methods import torch within functions: the command lists their constants before torch is loaded.
"""

from __future__ import annotations

from macer_serve.training.method import Method
from macer_serve.training.methods import consistency, gaussian, macer, smoothadv

METHODS: dict[str, Method] = {
    "gaussian": gaussian.METHOD,
    "consistency": consistency.METHOD,
    "macer": macer.METHOD,
    "smoothadv": smoothadv.METHOD,
}
