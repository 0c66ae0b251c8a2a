"""Issuers of 3,072 bits, made once per process."""

from __future__ import annotations

import pytest

from macer_serve.issuing import Issuer


@pytest.fixture(scope="session")
def issuer() -> Issuer:
    return Issuer.new()


@pytest.fixture(scope="session")
def other() -> Issuer:
    return Issuer.new()
