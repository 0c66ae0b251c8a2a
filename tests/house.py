"""The import graph of the project's own modules, read from their source: no module is imported for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The folders at the top level, by the names under which their modules are imported.
PACKAGES = {"macer_serve": "macer_serve", "macer_serve.training": "training"}

Graph = dict[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Returns the files of the project's modules by dotted name."""
    return {
        ".".join((package, *path.relative_to(root / folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for package, folder in PACKAGES.items()
        for path in sorted((root / folder).rglob("*.py"))  # follows no links: each file has one name
    }


def imports(root: Path = ROOT) -> Graph:
    """Returns what each module imports of the project, wherever the statement stands.

    Imports within functions and under `TYPE_CHECKING` count. `from package import name` is an import of `package.name`,
    if that is a module, and of the package. A table that names modules, such as that of the engines, is no import:
    it is how a room stays independent of what is added to it.
    """
    known = modules(root)
    graph: Graph = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {module for node in ast.walk(tree) for module in _named(node) if module in known} - {name}
    return graph


def _named(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute in this project"
        assert node.module is not None
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circles(graph: Graph) -> list[list[str]]:
    """Returns the groups of modules that import each other, directly or through others (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def room(module: str) -> str:
    """Returns the room of a module: its package, or the module itself at the top of `macer_serve`."""
    parts = module.split(".")
    return parts[0] if len(parts) == 1 else parts[1]
