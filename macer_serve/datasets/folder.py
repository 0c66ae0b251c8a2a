"""A user's own images: a tree of files, one folder per class."""

from __future__ import annotations

from dataclasses import replace

from macer_serve.datasets import imagenet

DATASET = replace(imagenet.DATASET, name="folder", title="a folder of images", like="imagenet")
