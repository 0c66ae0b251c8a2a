"""Tests are shared out among processes by what they have in common: a server, certificates, or else their module."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# Tests judge what is computed. How long that takes on a busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SHARED = ("serving", "verification")


class _ByWhatTheyShare(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        module, _, _ = nodeid.partition("::")
        return next((folder for folder in SHARED if f"tests/{folder}/" in module), module)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByWhatTheyShare(config, log)
