"""`macer key`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from macer_serve.issuing import KeySet

KEY_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("key")
def command() -> None:
    """Make, show and check the key that seeds and certificates are issued with."""


@command.command(short_help="Make a private key.")
@click.argument("file", type=KEY_FILE)
@click.option("--after", type=KEY_FILE, help="A key file or key set whose keys stay published, marked as retired.")
@click.option(
    "--bits", type=click.Choice(["3072", "4096"]), default="3072", show_default=True, help="Length of the key."
)
def new(file: Path, after: Path | None, bits: str) -> None:
    """Make a private key and write it to FILE, which must not exist.

    FILE can be read by its owner alone. Publish the output of `macer key public FILE` before the first certificate: a
    key binds its issuer from the moment that others know it. Use the key for nothing else.
    """
    from macer_serve.issuing import Issuer

    issuer = Issuer.new(int(bits), retired=_public(after) if after else None)
    issuer.save(file)
    click.echo(f"wrote {file}  key_id {issuer.key.kid}")


@command.command(short_help="Print the public keys.")
@click.argument("file", type=KEY_FILE)
@click.option("--pem", is_flag=True, help="Print PEM, as openssl reads it: without the proofs.")
def public(file: Path, pem: bool) -> None:
    """Print the public keys of FILE, a private key file, as a JWK Set, permutation proofs included."""
    keys = _public(file)
    if pem:
        click.echo("".join(f"{key!r}\n{key.to_pem()}" for key in map(keys.__getitem__, keys)), nl=False)
    else:
        click.echo(keys.to_json(), nl=False)


@command.command(short_help="Check keys and their proofs.")
@click.argument("file", type=KEY_FILE)
def check(file: Path) -> None:
    """Check every key of FILE, a private key file or a JWK Set, and its permutation proof.

    Exits with code 17 if one of the keys is refused.
    """
    keys = _public(file)
    for key in map(keys.__getitem__, keys):
        state = "retired" if key.retired else "present"
        click.echo(f"{key.kid}  {state}, {key.n.bit_length()} bits, the permutation proof holds")


def _public(file: Path) -> KeySet:
    """Returns the public keys of a private key file or of a JWK Set."""
    from macer_serve.issuing.issuer import public_keys
    from macer_serve.issuing.key_files import read

    return public_keys(read(file))
