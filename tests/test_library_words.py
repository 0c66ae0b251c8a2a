"""The library says what to do in its own words. Options of the command are the command's to name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "macer_serve"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def words(source: str) -> Iterator[str]:
    """Yields the strings of a module but its docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


LIBRARY = [path for path in sorted(ROOT.glob("**/*.py")) if "cli" not in path.parts]
LIBRARY += sorted((ROOT.parent / "training").rglob("*.py"))


def test_no_option_of_the_command_in_the_library() -> None:
    assert len(LIBRARY) > 100
    found = [f"{path}: {text}" for path in LIBRARY for text in words(path.read_text()) if OPTION.search(text)]
    assert not found


def test_an_option_would_be_seen() -> None:
    assert [text for text in words('"""--out"""\nx = f"{y}; choose another --out"') if OPTION.search(text)]
    assert not OPTION.search("a -- b, +--, ---, tag--name")
