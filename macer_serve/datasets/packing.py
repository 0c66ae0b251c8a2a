"""Makes a packed training set (`packed.py`) of a tree of image files.

What is finished lies in `.PACK.partial` beside the pack until all is; packing goes on from there. Each line of its
journal is one image whose pixels are on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from macer_serve.datasets.base import ImageSet
from macer_serve.datasets.packed import INDEX, INFO, PIXELS, PackInfo
from macer_serve.errors import DataError, OutputError, ParameterError, UploadError
from macer_serve.hardware import usable_cores
from macer_serve.locks import locked

JOURNAL = "journal.jsonl"
_AT_ONCE = 256  # images between two entries of the journal
_SPARE = 1.02  # disk space asked for, over the estimate


@dataclass(frozen=True, slots=True)
class _Packed:
    """One line of the journal. `stamp` is the size and the time of change of the file."""

    path: str
    label: int
    stamp: tuple[int, int]
    digest: str
    height: int
    width: int

    @property
    def size(self) -> int:
        return 3 * self.height * self.width

    def line(self) -> str:
        return json.dumps([self.path, self.label, self.stamp, self.digest, self.height, self.width]) + "\n"


def pack(images: ImageSet, root: Path, out: Path, *, short_side: int, progress: Callable[[int, int], None]) -> PackInfo:
    """Writes the pack of a tree's images whose files lie below `root`, and returns what it was made from.

    `progress` is called with the number of images done and their total. Stopped anywhere, it goes on from there when
    it is called again; files that changed meanwhile are packed anew. Raises `DataError` for a file that cannot be read
    and for a data set that is no tree, `ParameterError` for a side below 8, `OutputError` if `out` is taken or has too
    little room.
    """
    if not images.info.is_tree:
        raise DataError(
            f"{images.info.name} is held in memory anyway; only trees of image files are packed", settings=("dataset",)
        )
    if short_side < 8:
        raise ParameterError(f"images must keep at least 8 pixels on their short side, not {short_side}")
    if out.exists():
        raise OutputError(f"{out} is there already; remove it, or choose another output")
    with locked(out):
        try:
            return _pack(images, root, out, short_side, progress)
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error


def _pack(images: ImageSet, root: Path, out: Path, short_side: int, progress: Callable[[int, int], None]) -> PackInfo:
    samples = [(os.path.relpath(path, root), label) for path, label in images.source.samples]
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    header = json.dumps([images.info.name, list(images.classes), short_side]) + "\n"
    done = _finished(partial, header, samples, root)
    with (partial / PIXELS).open("ab") as pixels, (partial / JOURNAL).open("w", encoding="utf-8") as journal:
        pixels.truncate(sum(image.size for image in done))
        journal.write(header + "".join(image.line() for image in done))
        progress(len(done), len(samples))
        with ThreadPoolExecutor(usable_cores()) as readers:  # Pillow decodes without the interpreter's lock
            while len(done) < len(samples):
                part = samples[len(done) : len(done) + _AT_ONCE]
                made = readers.map(lambda sample: _resized(root, sample[0], sample[1], short_side), part)
                for image, array in made:
                    pixels.write(array)
                    done.append(image)
                pixels.flush()
                os.fsync(pixels.fileno())
                journal.write("".join(image.line() for image in done[-len(part) :]))
                journal.flush()
                progress(len(done), len(samples))
                _require_room(partial, done, len(samples))
    return _finish(images, partial, out, done, short_side)


def _finished(partial: Path, header: str, samples: list[tuple[str, int]], root: Path) -> list[_Packed]:
    """Returns the images of the journal that still stand: the first ones, of these settings, files and pixels."""
    try:
        first, *lines = (partial / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True)
        room = (partial / PIXELS).stat().st_size
    except (OSError, ValueError):
        return []
    done: list[_Packed] = []
    if first != header:
        return done
    for line, sample in zip(lines, samples, strict=False):
        try:
            path, label, stamp, digest, height, width = json.loads(line)
        except ValueError:  # it was cut off
            break
        image = _Packed(path, label, (stamp[0], stamp[1]), digest, height, width)
        room -= image.size
        if (path, label) != sample or room < 0 or _stamp(root / path) != image.stamp:
            break
        done.append(image)
    return done


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _resized(root: Path, path: str, label: int, short_side: int) -> tuple[_Packed, bytes]:
    """Returns an image as it is packed, and its pixels. Raises `DataError` for a file that the decoder refuses."""
    from PIL import Image

    from macer_serve.images import DEFAULT_LIMITS, decode, largest_divisor

    whole = root / path
    try:
        stamp = _stamp(whole)
        with whole.open("rb") as file:
            data = file.read(DEFAULT_LIMITS.bytes + 1)
        pixels = decode(data, reduction=lambda *size: largest_divisor(min(size) // short_side))
    except (OSError, UploadError) as error:
        raise DataError(
            f"{whole}: unreadable image ({error}); remove or replace it and run the same command again, which goes on"
        ) from error
    height, width = pixels.shape[:2]
    if min(height, width) > short_side:
        scale = short_side / min(height, width)
        size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    assert stamp is not None
    height, width = pixels.shape[:2]
    return _Packed(path, label, stamp, hashlib.sha256(data).hexdigest(), height, width), pixels.tobytes()


def _require_room(partial: Path, done: list[_Packed], images: int) -> None:
    """Raises `OutputError` if the disk has less room than the images that are left are likely to take."""
    left = sum(image.size for image in done) / len(done) * (images - len(done)) * _SPARE
    free = shutil.disk_usage(partial).free
    if left > free:
        raise OutputError(
            f"the pack needs about {left / 2**30:,.1f} GiB more, and {free / 2**30:,.1f} GiB are free there; make room "
            "and run the same command again, pack with a smaller side, or choose another output"
        )


def _finish(images: ImageSet, partial: Path, out: Path, done: list[_Packed], short_side: int) -> PackInfo:
    digest = hashlib.sha256(f"macer-serve/pack/1 {short_side}\n".encode())
    for image in done:
        digest.update(f"{image.digest} {image.label} {image.path}\n".encode(errors="surrogateescape"))
    ends = np.cumsum([image.size for image in done])
    index = np.array([[0, image.height, image.width, image.label] for image in done], dtype=np.int64)
    index[1:, 0] = ends[:-1]
    info = PackInfo(
        images.info.name, images.classes, images.folders, short_side, len(done), f"sha256:{digest.hexdigest()}"
    )
    np.save(partial / INDEX, index)
    (partial / INFO).write_text(json.dumps(info.to_json(), indent=2) + "\n", encoding="utf-8")
    (partial / JOURNAL).unlink()
    for name in (INDEX, INFO):
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(out)
    return info
