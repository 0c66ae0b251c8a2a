"""Tests are shared out among processes by what they have in common: a server, certificates, or else their module."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = ("serving", "verification")


@pytest.hookimpl(tryfirst=True)  # before they are shared out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = Path(item.path).parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in SHARED else str(item.path)))
