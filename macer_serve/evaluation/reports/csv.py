"""Tables as comma-separated values, with the names and the precision of the JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from macer_serve.evaluation.reports.table import Table


def render(table: Table) -> str:
    """Returns a line of names and one line per record. A value within another is named by both, with a dot between.

    Certified accuracies are named by their radii, such as `certified.0.25.accuracy`. What a record lacks is empty.
    """
    records = [dict(_flat(record)) for record in table.records]
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().removesuffix("\n")


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, list | tuple):
            for one in value:
                inner = {key: of for key, of in one.items() if key != "radius"}
                yield from _flat(inner, f"{prefix}{name}.{one['radius']:g}.")
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
