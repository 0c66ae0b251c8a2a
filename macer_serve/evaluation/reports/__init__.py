"""Reports: tables of certification logs, of training runs and of their cost, in several formats; and plots.

A table is made by `summary_table`, `training_table` or `table3`. `FORMATS` turns any of them into text.
"""

from __future__ import annotations

from collections.abc import Callable

from macer_serve.evaluation.reports import csv, json, latex, markdown, text
from macer_serve.evaluation.reports.table import Table

FORMATS: dict[str, Callable[[Table], str]] = {
    "text": text.render,
    "markdown": markdown.render,
    "latex": latex.render,
    "csv": csv.render,
    "json": json.render,
}

__all__ = ["FORMATS", "Table"]
