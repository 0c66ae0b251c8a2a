"""Tables in Markdown, as code hosts show them. The best figures are bold."""

from __future__ import annotations

import re

from macer_serve.evaluation.reports.table import PLUS_MINUS, Table

_SPECIAL = re.compile(r"([\\`*_|<>\[\]~])")


def render(table: Table) -> str:
    """Returns a table of pipes, and the notes below as a list."""
    rule = ["---" if column in table.left else "---:" for column in range(len(table.titles))]
    rows = [
        [_bold(text) if (at, column) in table.best else _text(text) for column, text in enumerate(row)]
        for at, row in enumerate(table.rows)
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in ([*map(_text, table.titles)], rule, *rows)]
    return "\n".join([*lines, *([""] if table.notes else []), *(f"- {_text(note)}" for note in table.notes)])


def _text(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text).replace(PLUS_MINUS, "±")


def _bold(text: str) -> str:
    figure, *error = text.split(f" {PLUS_MINUS} ")
    return " ± ".join([f"**{_text(figure)}**", *map(_text, error)])
