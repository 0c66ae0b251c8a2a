"""The findings of a verification, line by line, and the verdict that follows from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from macer_serve.verification.verdicts import Verdict, gravest

Outcome = Literal["holds", "does not hold", "not checked"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and its outcome. `means` is the verdict that follows if the check does not hold, or was not made."""

    check: str
    outcome: Outcome
    words: str
    means: Verdict = Verdict.ALTERED


@dataclass(frozen=True, slots=True)
class Verification:
    """All findings about one certificate."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that do not hold."""
        return tuple(f for f in self.findings if f.outcome == "does not hold")

    @property
    def not_checked(self) -> tuple[Finding, ...]:
        """The checks that were not made."""
        return tuple(f for f in self.findings if f.outcome == "not checked")

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict among failed checks. If no check failed, the gravest among checks that were not made."""
        failed = gravest([f.means for f in self.failed])
        return gravest([f.means for f in self.not_checked]) if failed is Verdict.PROVED else failed

    @property
    def reasons(self) -> tuple[Finding, ...]:
        """The findings that the verdict rests on: failed checks, or else checks that were not made."""
        return self.failed or self.not_checked

    def to_json(self) -> dict[str, Any]:
        """Returns verdict and findings as JSON values."""
        return {
            "verdict": self.verdict.value,
            "meaning": self.verdict.paragraph,
            "does_not_hold": [f.check for f in self.failed],
            "not_checked": [f.check for f in self.not_checked],
            "findings": [{"check": f.check, "outcome": f.outcome, "words": f.words} for f in self.findings],
        }


def holds(check: str, words: str) -> Finding:
    """Returns the finding that a check holds."""
    return Finding(check, "holds", words)


def fails(check: str, words: str, means: Verdict = Verdict.ALTERED) -> Finding:
    """Returns the finding that a check does not hold."""
    return Finding(check, "does not hold", words, means)


def unchecked(check: str, why: str, means: Verdict = Verdict.CONSISTENT) -> Finding:
    """Returns the finding that a check was not made."""
    return Finding(check, "not checked", why, means)


def escaped(text: str) -> str:
    """Returns text that may quote a record as one short line of ASCII, safe for a terminal."""
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= 300 else f"{text[:290]}..."


def shown(value: Any) -> str:
    """Returns a value of a record as one short line of ASCII, safe for a terminal whatever the record holds."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def agrees(check: str, recorded: Any, derived: Any, source: str, *, means: Verdict = Verdict.ALTERED) -> Finding:
    """Returns whether a recorded value is the value that follows from `source`."""
    if recorded == derived and type(recorded) is type(derived):
        return holds(check, f"{shown(recorded)}: follows from {source}")
    return fails(check, f"{shown(recorded)} is recorded, {shown(derived)} follows from {source}", means)
