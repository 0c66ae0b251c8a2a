"""What an auditor may conclude about a certificate: the verdicts, each with a paragraph in plain words."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """The verdicts, the gravest first. The value is a verdict's name."""

    NOT_READABLE = "not readable"
    OTHER_KEY = "issued under another key"
    ALTERED = "altered"
    OTHER_SUBJECT = "about another image or checkpoint"
    CONTRADICTED = "contradicted"
    POLICY_NOT_FIXED = "policy not fixed beforehand"
    NOT_AUTHENTICATED = "not authenticated"
    WITHHELD = "signed, evidence withheld"
    OTHER_ENGINE = "another engine"
    CONSISTENT = "consistent"
    PROVED = "proved"

    @property
    def paragraph(self) -> str:
        """What the verdict means, in plain words."""
        return _PARAGRAPHS[self]

    @property
    def refutes(self) -> bool:
        """Whether the verdict refutes the document. A refuted document is false, or about another image or model."""
        return _RANK[self] <= _RANK[Verdict.POLICY_NOT_FIXED]


_RANK = {verdict: rank for rank, verdict in enumerate(Verdict)}


def gravest(verdicts: list[Verdict]) -> Verdict:
    """Returns the gravest of the verdicts, `PROVED` if there are none."""
    return min(verdicts, key=_RANK.__getitem__, default=Verdict.PROVED)


_PARAGRAPHS = {
    Verdict.NOT_READABLE: "This is not a certificate that this version can read. Nothing was checked.",
    Verdict.OTHER_KEY: (
        "The document names a key that is not among the public keys that you gave. It may be a good certificate of "
        "another issuer, or of this issuer before or after a change of keys. Ask the issuer for the key."
    ),
    Verdict.ALTERED: (
        "The document is not as its issuer wrote it: the signature does not hold, or a field does not agree with what "
        "the other fields say. Do not rely on it."
    ),
    Verdict.OTHER_SUBJECT: (
        "The certificate is about another image, or about another model than your checkpoint. It says nothing about "
        "these."
    ),
    Verdict.CONTRADICTED: (
        "The issuer signed this certificate, and it is false: counting the votes again, or the arithmetic of the "
        "record itself, gives something else."
    ),
    Verdict.POLICY_NOT_FIXED: (
        "The issuer signed this certificate, but its noise seed does not belong to this input, model and policy. The "
        "number of votes or the bound may have been chosen after the votes were known, so that the stated confidence "
        "is not supported."
    ),
    Verdict.NOT_AUTHENTICATED: (
        "Nothing contradicts this record, but nobody's signature was checked. Anybody may have written it, with a seed "
        "chosen among many. Give the issuer's public keys, and a certificate that carries a signature."
    ),
    Verdict.WITHHELD: (
        "The issuer signed this claim, and it is about this image and this model. The issuer keeps the certificate "
        "that would prove it, because published radii help attackers. The claim names that certificate by its digest, "
        "so that the issuer cannot replace it. Ask for it, and check it with the claim."
    ),
    Verdict.OTHER_ENGINE: (
        "The signature, the seed and the arithmetic hold. Your engine computes the network in another arithmetic than "
        "the issuer's, so that its votes on the same noisy copies need not be identical. Both results are shown; the "
        "certificate is about the network as the issuer's engine ran it."
    ),
    Verdict.CONSISTENT: (
        "The signature holds, and everything that follows from the record agrees with it. Not everything was checked: "
        "if the votes were not counted again, the issuer's word stands for them."
    ),
    Verdict.PROVED: (
        "The issuer signed this certificate. The noise belongs to this image, this model and a policy that was fixed "
        "before the votes. Counting the votes again gave the same votes, and the class and the radius follow from them."
    ),
}
