"""Tables in plain text."""

from __future__ import annotations

from macer_serve.evaluation.reports.table import Table


def render(table: Table) -> str:
    """Returns lines of equal columns, and the notes below."""
    cells = [table.titles, *table.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in table.left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([*lines, *([""] if table.notes else []), *table.notes])
