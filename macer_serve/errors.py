"""What can go wrong for a user, and how each way is answered.

    MacerError                      anything a user can cause or repair
    ├── ParameterError              a value outside its allowed range
    │   └── MissingFactsError       what neither a foreign file nor its user says about the network
    ├── CheckpointError             a checkpoint that is missing, damaged or of an unknown schema
    ├── DataError                   a data set that is missing or not laid out as expected
    ├── LogError                    a certification log that cannot be read or continued
    ├── OutputError                 an output that cannot be written, or that another process is writing
    ├── TrainingError               a run that cannot start, continue or converge
    ├── EngineError                 a voter that cannot do what was asked of it
    │   └── EngineMismatchError     two voters that do not compute the same base classifier
    ├── IssuerKeyError              a key file or key set that cannot be used, or a key that is refused
    ├── UploadError                 an upload that is not an acceptable image
    │   ├── UndecodableError        damaged, empty, or not an image at all
    │   ├── UnsupportedTypeError    an image, of a kind that is not accepted
    │   └── TooLargeError           too many bytes or pixels
    └── VerificationError           a certificate that does not hold
        ├── InconsistentError       its fields do not follow from each other, or its mac or votes are not the server's
        ├── MismatchError           it is about another image or checkpoint
        ├── OtherKeyError           it was issued under a key that the auditor does not hold
        └── ContradictedError       fresh votes speak against it

Every class carries the HTTP status and the exit code with which the edges answer it, so that the two
tables cannot drift apart.
"""

from __future__ import annotations


class MacerError(Exception):
    """An error that a user can cause or repair; its message says what to do."""

    status: int = 500
    exit_code: int = 1
    title: str = "Error"


class ParameterError(MacerError, ValueError):
    status, exit_code, title = 422, 2, "Parameter outside its allowed range"


class MissingFactsError(ParameterError):
    """`facts` are the names of the missing fields of `macer_serve.importing.Facts`."""

    def __init__(self, message: str, facts: tuple[str, ...]) -> None:
        super().__init__(message)
        self.facts = facts


class CheckpointError(MacerError):
    status, exit_code, title = 500, 3, "Checkpoint cannot be used"


class DataError(MacerError):
    status, exit_code, title = 500, 4, "Data set cannot be used"


class LogError(MacerError):
    status, exit_code, title = 500, 5, "Certification log cannot be used"


class OutputError(MacerError):
    status, exit_code, title = 500, 14, "Output cannot be written"


class TrainingError(MacerError):
    status, exit_code, title = 500, 6, "Training stopped"


class EngineError(MacerError):
    status, exit_code, title = 503, 7, "Voter cannot answer"


class EngineMismatchError(EngineError):
    title = "Voters do not compute the same base classifier"


class IssuerKeyError(MacerError):
    status, exit_code, title = 500, 9, "Issuer's key cannot be used"


class UploadError(MacerError):
    status, exit_code, title = 400, 8, "Upload cannot be used"


class UndecodableError(UploadError):
    title = "Image cannot be decoded"


class UnsupportedTypeError(UploadError):
    status, title = 415, "Image type is not supported"


class TooLargeError(UploadError):
    status, title = 413, "Image is too large"


class VerificationError(MacerError):
    status, exit_code, title = 422, 10, "Certificate does not hold"


class InconsistentError(VerificationError):
    title = "Certificate is inconsistent or forged"


class MismatchError(VerificationError):
    exit_code, title = 11, "Certificate is about another image or checkpoint"


class OtherKeyError(VerificationError):
    exit_code, title = 13, "Certificate was issued under another key"


class ContradictedError(VerificationError):
    exit_code, title = 12, "Certificate is contradicted by fresh votes"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error of another library, or the name of its class if it says nothing."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
