"""The project's pages, taken apart: prose, code blocks, links, inline code and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").rglob("*.md")])

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)


def name_of(page: Path) -> str:
    """Returns the page's path below the root, which names it in the test's report."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str | None = None) -> list[str]:
    """Returns the code blocks of a page, fenced and indented, or only those fenced as the language."""
    text = page.read_text(encoding="utf-8")
    fenced = [body for kind, body in _FENCE.findall(text) if language in (None, kind)]
    return fenced if language else fenced + _INDENTED.findall(_FENCE.sub("", text))


def prose(page: Path) -> str:
    """Returns a page without its code blocks."""
    return _INDENTED.sub("\n", _FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> list[str]:
    """Returns the targets of a page's links, web addresses left out."""
    found: list[str] = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?<!\[)`[^`]*`(?!\])", "", prose(page)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline(page: Path) -> list[str]:
    """Returns the inline code of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> Iterator[list[str]]:
    """Yields the commands of a page as words: those of its code blocks and of its inline code.

    Only programs that the project provides count. Brackets around what may be left out are removed, and so are prompts,
    variables and redirections.
    """
    for block in [*blocks(page), *inline(page)]:
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\[(--?\w[^]]*)\]", r"\1", line.strip().removeprefix("$ "))
            if not _COMMAND.search(line):
                continue
            split = shlex.shlex(line, posix=True, punctuation_chars=True)
            split.whitespace_split = True
            words: list[str] = []
            for word in [*split, "&&"]:
                if set(word) <= set("&|;<>()"):
                    if words and words[0] in _PROGRAMS:
                        yield words
                    words = []
                elif words or not re.match(r"\w+=", word):
                    words.append(word)


_PROGRAMS = ("macer", "serve", "python", "scripts/check", "scripts/examples", ".ci/run")
_COMMAND = re.compile(rf"(?:^|[ &|;])(?:{'|'.join(map(re.escape, _PROGRAMS))})(?: |$)")


@cache
def files() -> frozenset[str]:
    """Returns the paths of the project's files and folders below the root."""
    inside = [path for name in _FOLDERS for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    inside = [path for path in inside if "__pycache__" not in path.parts]
    return frozenset(path.relative_to(ROOT).as_posix() for path in [*inside, *ROOT.glob("*.*")])


_FOLDERS = (
    ".ci", "benchmarks", "deployments", "docs", "macer_serve", "results", "scripts", "tests", "training",
)  # fmt: skip
