"""The exit codes of the `macer` command. Click itself ends with 2 for wrong options and 1 for an abort."""

from __future__ import annotations

from macer_serve import errors

# The nearest ancestor that is listed decides.
EXIT_CODES: dict[type[errors.MacerError], int] = {
    errors.MacerError: 1,
    errors.ParameterError: 2,
    errors.CheckpointError: 3,
    errors.DataError: 4,
    errors.LogError: 5,
    errors.TrainingError: 6,
    errors.EngineError: 7,
    errors.UploadError: 8,
    errors.ServingError: 9,
    errors.VerificationError: 10,
    errors.MismatchError: 11,
    errors.ContradictedError: 12,
    errors.OutputError: 14,
}


def exit_code(error: errors.MacerError) -> int:
    """Returns the exit code of an error."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)
