"""Tables as JSON."""

from __future__ import annotations

import json

from macer_serve.evaluation.reports.table import Table


def render(table: Table) -> str:
    """Returns an array with one object per record."""
    return json.dumps(list(table.records), indent=2, allow_nan=False)
