"""`macer verify`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from macer_serve.cli.exit_codes import VERDICTS
from macer_serve.cli.image_arguments import image_of

if TYPE_CHECKING:
    from macer_serve.checkpoint import CheckpointConfig
    from macer_serve.issuing import KeySet
    from macer_serve.smoothing.noise import NoiseKind
    from macer_serve.verification import Document, Verification
    from macer_serve.verification.short_claims import ClaimDocument
    from macer_serve.voters import Voter

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@click.command("verify")
@click.argument("certificate", type=click.Path(path_type=Path, exists=True))
@click.argument("image")
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="The issuer's public keys, as the server's /.well-known/jwks.json gives them. Get them from a trusted source.",
)
@click.option("--checkpoint", default="bundled:cifar10", show_default=True, help="A folder, or bundled:NAME.")
@click.option(
    "--withheld",
    type=click.Path(path_type=Path, exists=True),
    default=None,
    help="The certificate behind a short claim, or the folder in which the operator keeps certificates.",
)
@click.option("--recount/--no-recount", default=True, show_default=True, help="Count the votes again.")
@click.option("--device", default=None, help="cpu or cuda.  [default: that of the record's engine, if it is here]")
@click.option("--verbose", is_flag=True, help="Print every finding.")
@click.option("--json", "as_json", is_flag=True, help="Print verdict and findings as JSON.")
def command(
    certificate: Path,
    image: str,
    key: Path | None,
    checkpoint: str,
    withheld: Path | None,
    recount: bool,
    device: str | None,
    verbose: bool,
    as_json: bool,
) -> None:
    """Check a CERTIFICATE about an IMAGE: the answer of POST /predict, the certificate in it, or its signed form.

    The signature is checked, everything that follows from the record is computed again, the noise seed is checked
    against image, model and policy, and the votes are counted again on the very same noisy copies. Nothing of this
    takes a secret.

    IMAGE is a file, or - for standard input. If CERTIFICATE is a folder, IMAGE is a folder, too. Each NAME.json in the
    one is about the image of that name in the other. The exit code is that of the gravest verdict.

    \b
    Exit codes:
      0   proved
      10  altered                            20  consistent
      11  about another image or checkpoint  21  another engine
      12  contradicted                       22  signed, evidence withheld
      13  issued under another key           23  not authenticated
      14  not readable
      15  policy not fixed beforehand
      2   a parameter is out of range; 3 checkpoint, 7 voter, 8 image, 17 key cannot be used
    """
    import json

    from macer_serve.checkpoint import load_config
    from macer_serve.issuing.issuer import public_keys
    from macer_serve.issuing.key_files import read

    keys = public_keys(read(key)) if key is not None else None
    auditor = _Auditor(checkpoint, load_config(checkpoint), keys, device, recount, withheld)
    if not certificate.is_dir():
        report, verdict = auditor.verdict(certificate, image)
        click.echo(json.dumps(report, indent=2) if as_json else _in_words(report, verbose))
        sys.exit(VERDICTS[verdict])
    verdicts = []
    for file, about in _pairs(certificate, Path(image)):
        report, verdict = auditor.verdict(file, str(about))
        verdicts.append(verdict)
        if as_json:
            click.echo(json.dumps({"certificate": str(file), "image": str(about), **report}))
        else:
            click.echo(f"{verdict:<34} {file}")
    if not as_json:
        counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS if verdict in verdicts}
        click.echo(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    sys.exit(max((VERDICTS[verdict] for verdict in verdicts), key=_gravity))


class _Auditor:
    """What is the same for all certificates of one command: checkpoint, keys, and the voters that were opened."""

    def __init__(
        self,
        checkpoint: str,
        config: CheckpointConfig,
        keys: KeySet | None,
        device: str | None,
        recount: bool,
        withheld: Path | None,
    ) -> None:
        self._checkpoint, self._config, self._keys, self._device = checkpoint, config, keys, device
        self._recount, self._withheld = recount, withheld
        self._voters: dict[tuple[str, Any], Voter] = {}

    def verdict(self, file: Path, image: str) -> tuple[dict[str, Any], str]:
        """Returns the report on one certificate as JSON values, and the verdict's name."""
        from macer_serve.errors import ParameterError
        from macer_serve.verification import Verdict, read_document
        from macer_serve.verification.short_claims import read_claim

        try:
            data = _bytes_of(file)
            document = read_claim(data) or read_document(data)
            withheld = self._kept(document)
        except (ParameterError, OSError) as error:
            unreadable = Verdict.NOT_READABLE
            words = str(error) if isinstance(error, ParameterError) else f"{file}: {error.strerror or error}"
            found = [{"check": "document", "outcome": "does not hold", "words": words}]
            report = {"verdict": unreadable.value, "meaning": unreadable.paragraph}
            return {**report, "does_not_hold": ["document"], "not_checked": [], "findings": found}, unreadable.value
        verified = self._verified(document, image, withheld)
        return verified.to_json(), verified.verdict.value

    def _kept(self, document: Document | ClaimDocument) -> bytes | None:
        """Returns the certificate behind a short claim, if the operator shows it. Raises `OSError`."""
        from macer_serve.verification import Document

        if isinstance(document, Document) or self._withheld is None:
            return None
        name = document.claim.withheld.removeprefix("sha256:")
        file = self._withheld / f"{name}.jws" if self._withheld.is_dir() else self._withheld
        return _bytes_of(file) if len(name) == 64 and name.isalnum() and file.is_file() else None

    def _verified(self, document: Document | ClaimDocument, image: str, withheld: bytes | None) -> Verification:
        from tqdm import tqdm

        from macer_serve.verification import Document, read_document, verify
        from macer_serve.verification.short_claims import verify_claim

        with tqdm(unit="vote", file=sys.stderr, leave=False, delay=0.5) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            def voter(noise: NoiseKind) -> Voter:
                whole = document if isinstance(document, Document) else read_document(withheld or b"")
                return self._voter(whole.certificate.engine, noise)

            checks: dict[str, Any] = {
                "keys": self._keys,
                "voter": voter if self._recount else None,
                "progress": progress,
            }
            if isinstance(document, Document):
                return verify(document, image_of(image), self._config, **checks)
            return verify_claim(document, image_of(image), self._config, withheld=withheld, **checks)

    def _voter(self, engine: str, noise: NoiseKind) -> Voter:
        """Returns a voter like the record's engine, if this machine has one; voters are kept for later records."""
        from macer_serve.smoothed import SmoothedClassifier
        from macer_serve.verification.engines import options_like

        options = options_like(engine, self._config.input_shape[1] * self._config.input_shape[2], self._device)
        if (noise, options) not in self._voters:
            voter = SmoothedClassifier.load(self._checkpoint, noise=noise, options=options).voter
            assert voter is not None
            self._voters[noise, options] = voter
        return self._voters[noise, options]


def _bytes_of(file: Path) -> bytes:
    """Returns the bytes of a file; of a file of gigabytes, no more than it takes to refuse it."""
    from macer_serve.verification.reading import MAX_BYTES

    with file.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


def _in_words(report: dict[str, Any], verbose: bool) -> str:
    """Returns verdict, meaning and the findings that the verdict rests on; with `verbose` all findings."""
    lines = [f"{report['verdict']}", report["meaning"]]
    for finding in report["findings"]:
        if verbose or finding["outcome"] != "holds":
            lines.append(f"{finding['outcome']:<14} {finding['check']}: {finding['words']}")
    return "\n".join(lines)


def _pairs(certificates: Path, images: Path) -> Iterator[tuple[Path, Path]]:
    """Yields each certificate of a folder with the image of its name. Raises `ParameterError` if there is none."""
    from macer_serve.errors import ParameterError

    files = sorted(certificates.glob("*.json"))
    if not files or not images.is_dir():
        raise ParameterError(f"{certificates}: a folder of NAME.json needs a folder of images, NAME.png and the like")
    for file in files:
        found = [path for path in images.iterdir() if path.stem == file.stem and path.suffix.lower() in IMAGE_SUFFIXES]
        if len(found) != 1:
            raise ParameterError(f"{file}: {len(found)} images of that name in {images}; there must be one")
        yield file, found[0]


def _gravity(code: int) -> tuple[bool, int]:
    """Orders exit codes: refutations (10 to 19) come after verdicts that were only not proved."""
    return 10 <= code < 20, code
