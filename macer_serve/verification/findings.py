"""The findings of a verification, line by line, and the verdict that follows from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from macer_serve.errors import ContradictedError, InconsistentError, MismatchError, VerificationError

Outcome = Literal["holds", "does not hold", "not checked"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and its outcome. `error` says what it means if the check does not hold."""

    check: str
    outcome: Outcome
    words: str
    error: type[VerificationError] = InconsistentError


@dataclass(frozen=True, slots=True)
class Verification:
    """All findings about one certificate."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.outcome == "does not hold")

    @property
    def error(self) -> VerificationError | None:
        """The gravest error; None if everything that was checked holds."""
        for kind in (InconsistentError, MismatchError, ContradictedError):
            if named := [f.check for f in self.failed if f.error is kind]:
                which = "" if kind is ContradictedError else f": {', '.join(named)}"
                return kind(kind.title.lower() + which)
        return None

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        if self.error is not None:
            return str(self.error)
        unchecked = [f.check for f in self.findings if f.outcome == "not checked"]
        return "everything that was checked holds" + (f"; not checked: {', '.join(unchecked)}" if unchecked else "")

    def to_json(self) -> dict[str, Any]:
        """Returns the findings as JSON values."""
        return {
            "holds": self.error is None,
            "verdict": self.verdict,
            "findings": [{"check": f.check, "outcome": f.outcome, "words": f.words} for f in self.findings],
        }


def holds(check: str, words: str) -> Finding:
    return Finding(check, "holds", words)


def unchecked(check: str, why: str) -> Finding:
    return Finding(check, "not checked", why)


def escaped(text: str) -> str:
    """Returns text that may quote a record as one short line of ASCII, safe for a terminal."""
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= 300 else f"{text[:290]}..."


def shown(value: Any) -> str:
    """Returns a value of a record as one short line of ASCII, safe for a terminal whatever the record holds."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def agrees(
    check: str, recorded: Any, derived: Any, source: str, *, error: type[VerificationError] = InconsistentError
) -> Finding:
    """Returns whether a recorded value is the value that follows from `source`."""
    if recorded == derived and type(recorded) is type(derived):
        return holds(check, f"{shown(recorded)}: follows from {source}")
    words = f"{shown(recorded)} is recorded, {shown(derived)} follows from {source}"
    return Finding(check, "does not hold", words, error)
