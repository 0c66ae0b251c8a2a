"""What can go wrong for a user.

    MacerError                      anything a user can cause or repair
    ├── ParameterError              a value outside its allowed range
    │   └── MissingFactsError       what neither a foreign file nor its user says about the network
    ├── CheckpointError             a checkpoint that is missing, damaged or of an unknown schema
    ├── DataError                   a data set that is missing or not laid out as expected
    │   └── UnreadableImageError    a file of a data set that the decoder refuses
    ├── LogError                    a certification log that cannot be read or continued
    ├── OutputError                 an output that cannot be written, or that another process is writing
    ├── TrainingError               a run that cannot start, continue or converge
    │   └── InterruptedRunError     a run that was told to stop, and saved its state
    ├── EngineError                 a voter that cannot do what was asked of it
    │   └── EngineMismatchError     two voters that do not compute the same base classifier
    ├── IssuerKeyError              a key file or key set that cannot be used, or a key that is refused
    ├── UploadError                 an upload that is not an acceptable image
    │   ├── UndecodableError        damaged, empty, or not an image at all
    │   ├── UnsupportedTypeError    an image, of a kind that is not accepted
    │   └── TooLargeError           too many bytes or pixels
    ├── VerificationError           a signature or a seed proof that cannot be accepted
    │   ├── SignatureError          a signature or a seed proof that does not hold
    │   └── OtherKeyError           a signature by a key that the auditor does not hold
    ├── ClusterError                a Ray cluster that cannot be started or joined, or that loses its workers
    └── ServingError                a server that cannot start, or cannot answer now

The command maps errors to exit codes (`macer_serve.cli.exit_codes`). The server maps errors to HTTP statuses
(`macer_serve.serving.problems`).
"""

from __future__ import annotations


class MacerError(Exception):
    """An error that a user can cause or repair; its message says what to do.

    `settings` are the names of the arguments that the message is about, such as `held_out`. The command adds its
    options of these names to the message.
    """

    title: str = "Error"

    def __init__(self, message: object = "", *, settings: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.settings = settings


class ParameterError(MacerError, ValueError):
    title = "Parameter outside its allowed range"


class MissingFactsError(ParameterError):
    """`facts` are the names of the missing fields of `macer_serve.importing.Facts`."""

    def __init__(self, message: str, facts: tuple[str, ...]) -> None:
        super().__init__(message)
        self.facts = facts


class CheckpointError(MacerError):
    title = "Checkpoint cannot be used"


class DataError(MacerError):
    title = "Data set cannot be used"


class UnreadableImageError(DataError):
    title = "Image of a data set cannot be decoded"


class LogError(MacerError):
    title = "Certification log cannot be used"


class OutputError(MacerError):
    title = "Output cannot be written"


class TrainingError(MacerError):
    title = "Training stopped"


class InterruptedRunError(TrainingError):
    """Raised after SIGTERM or SIGINT, when the state of the run is saved."""


class EngineError(MacerError):
    title = "Voter cannot answer"


class EngineMismatchError(EngineError):
    title = "Voters do not compute the same base classifier"


class IssuerKeyError(MacerError):
    title = "Issuer's key cannot be used"


class UploadError(MacerError):
    title = "Upload cannot be used"


class UndecodableError(UploadError):
    title = "Image cannot be decoded"


class UnsupportedTypeError(UploadError):
    title = "Image type is not supported"


class TooLargeError(UploadError):
    title = "Image is too large"


class VerificationError(MacerError):
    title = "Signature cannot be accepted"


class SignatureError(VerificationError):
    title = "Signature does not hold"


class OtherKeyError(VerificationError):
    title = "Issued under another key"


class ClusterError(MacerError):
    title = "Ray cluster cannot be used"


class ServingError(MacerError):
    title = "Server cannot answer"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error of another library, or the name of its class if it says nothing."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
