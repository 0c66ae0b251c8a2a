"""Names for the folders of an image tree. Folders are often WordNet ids: n01443537 is a goldfish."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from macer_serve.errors import DataError

# The files of names that are published with image trees: their lines give a folder, then its names.
NAMES_FILES: dict[str, tuple[re.Pattern[str], str]] = {
    "LOC_synset_mapping.txt": (re.compile(r"(\S+) +(.+)"), "<folder> <name>, <synonym>, ..."),
    "words.txt": (re.compile(r"([^\t]+)\t(.+)"), "<folder><tab><name>, <synonym>, ..."),
    "imagenet_classes.txt": (re.compile(r"\d+\t([^\t]+)\t(.+)"), "<number><tab><folder><tab><name>"),
}


def class_names(folders: Sequence[str], places: Sequence[Path]) -> tuple[str, ...]:
    """Returns one name per folder, in the folders' order, from the first file of `NAMES_FILES` in `places`.

    A name is the first synonym of the folder, underscores replaced by spaces. Names that several folders share get the
    folder in brackets (ImageNet has two cranes, a bird and a machine), so that no two names are equal. A folder that
    the file lacks is named by itself; without a file all folders are. Raises `DataError` with the line of a damaged
    file.
    """
    file = next((place / name for place in places for name in NAMES_FILES if (place / name).is_file()), None)
    if file is None:
        return tuple(folders)
    known = _read(file)
    names = [known.get(folder, folder) for folder in folders]
    times = Counter(names)
    return tuple(
        name if times[name] == 1 or name == folder else f"{name} ({folder})"
        for name, folder in zip(names, folders, strict=True)
    )


def _read(file: Path) -> dict[str, str]:
    """Returns the first name of every folder in the file."""
    pattern, form = NAMES_FILES[file.name]
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    known: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            match = pattern.fullmatch(line.decode().rstrip())
        except UnicodeDecodeError:
            match = None
        name = match[2].split(",")[0].replace("_", " ").strip() if match else ""
        if match is None or not name:
            shown = line.decode(errors="replace")[:60]
            raise DataError(f"{file}, line {number}: expected '{form}', found {shown!r}; repair or remove the file")
        if match[1] in known:
            raise DataError(f"{file}, line {number}: {match[1]} has a name already; repair or remove the file")
        known[match[1]] = name
    return known
