"""Tables in LaTeX, for a document with `\\usepackage{booktabs}`. The best figures are bold."""

from __future__ import annotations

import re

from macer_serve.evaluation.reports.table import PLUS_MINUS, Table

_MACROS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_MACROS |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"}
_MACROS |= {character: f"\\{character}" for character in "&%$#_{}"}
_SPECIAL = re.compile(f"[{re.escape(''.join(_MACROS))}]")


def render(table: Table) -> str:
    """Returns a tabular environment. Notes are comments before it; those with an asterisk stand below the table."""
    columns = "".join("l" if column in table.left else "r" for column in range(len(table.titles)))
    marked = [note for note in table.notes if note.startswith("*")]
    rows = [
        [_bold(text) if (at, column) in table.best else _text(text) for column, text in enumerate(row)]
        for at, row in enumerate(table.rows)
    ]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *(f"% {note}" for note in table.notes if note not in marked),
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _line([*map(_text, table.titles)]),
            r"\midrule",
            *map(_line, rows),
            r"\bottomrule",
            *(rf"\multicolumn{{{len(columns)}}}{{l}}{{\footnotesize {_text(note)}}} \\" for note in marked),
            r"\end{tabular}",
        ]
    )


def _line(cells: list[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _text(text: str) -> str:
    if text == "-":
        return "--"
    return _SPECIAL.sub(lambda match: _MACROS[match[0]], text).replace(PLUS_MINUS, r"$\pm$")


def _bold(text: str) -> str:
    figure, *error = text.split(f" {PLUS_MINUS} ")
    return r" $\pm$ ".join([rf"\textbf{{{_text(figure)}}}", *map(_text, error)])
