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
    errors.OtherKeyError: 13,
    errors.OutputError: 16,
    errors.IssuerKeyError: 17,
    errors.ClusterError: 18,
}

# Of a training run that was told to stop and saved its state, as a shell reports SIGTERM.
STOPPED = 143

# Of `macer verify`, by verdict. Verdicts of 10 to 19 refute the certificate.
VERDICTS = {
    "proved": 0,
    "altered": 10,
    "about another image or checkpoint": 11,
    "contradicted": 12,
    "issued under another key": 13,
    "not readable": 14,
    "policy not fixed beforehand": 15,
    "consistent": 20,
    "another engine": 21,
    "signed, evidence withheld": 22,
    "not authenticated": 23,
}


def exit_code(error: errors.MacerError) -> int:
    """Returns the exit code of an error."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)
