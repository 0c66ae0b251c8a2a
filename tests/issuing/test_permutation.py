"""The permutation proof: honest keys have it, dishonest keys cannot have it, and nothing else passes for it."""

from __future__ import annotations

import math
import secrets
from fractions import Fraction
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from dishonest_keys import MESSAGE, P_512, P_1536, Q_512, Q_1536

from macer_serve.errors import IssuerKeyError
from macer_serve.issuing import Issuer, IssuerKey
from macer_serve.issuing.base64url import encode, encode_integer
from macer_serve.issuing.keys import PROOF, jwk_of
from macer_serve.issuing.permutation import ROOTS, challenges, fault, prove
from macer_serve.issuing.rsa import PUBLIC_EXPONENT as E
from macer_serve.issuing.rsa import accepts, encoded, thumbprint, width
from macer_serve.issuing.seeds import seed_of


def probably_prime(n: int) -> bool:
    """Miller and Rabin's test with 30 random bases."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(30):
        x = pow(secrets.randbelow(n - 3) + 2, odd, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True


def primes(issuer: Issuer) -> tuple[int, int]:
    numbers = issuer._private.private_numbers()
    return numbers.p, numbers.q


def test_the_soundness_error_is_below_2_to_the_minus_128() -> None:
    per_root = Fraction(2**256 + 1, 2**256) / E
    assert per_root**ROOTS < Fraction(1, 2**128) < per_root ** (ROOTS - 1)
    assert probably_prime(E)


def test_an_honest_key_has_exactly_one_proof_and_it_holds(issuer: Issuer) -> None:
    p, q = primes(issuer)
    n, proof = p * q, issuer.key.proof
    assert fault(n, proof) is None
    assert proof == prove(p, q) == prove(q, p)
    assert [pow(root, E * n, n) for root in proof] == challenges(n)
    assert math.gcd(E * n, (p - 1) * (q - 1)) == 1


def test_challenges_belong_to_the_key_and_reach_all_residues(issuer: Issuer, other: Issuer) -> None:
    assert not set(challenges(issuer.key.n)) & set(challenges(other.key.n))
    assert len(set(challenges(issuer.key.n))) == ROOTS
    # Each is uniform: none of 16 lies in the lowest 2^-40 of the residues.
    assert all(r > n >> 40 for n in (issuer.key.n, other.key.n) for r in challenges(n))


def wrong_proofs(issuer: Issuer, other: Issuer) -> dict[str, tuple[int, ...]]:
    n, proof = issuer.key.n, issuer.key.proof
    d = issuer._private.private_numbers().d
    return {
        "none": (),
        "seven roots": proof[:-1],
        "nine roots": (*proof, proof[0]),
        "two swapped": (proof[1], proof[0], *proof[2:]),
        "the last one twice": (*proof[:-2], proof[-1], proof[-1]),
        "another key's": other.key.proof,
        "a root plus n": (proof[0] + n, *proof[1:]),
        "a root of minus r": (n - proof[0], *proof[1:]),
        "zeros": (0,) * ROOTS,
        "ones": (1,) * ROOTS,
        "the challenges themselves": tuple(challenges(n)),
        "e-th roots in place of e n-th": tuple(pow(r, d, n) for r in challenges(n)),
        **{f"root {i + 1} changed": (*proof[:i], proof[i] ^ 2, *proof[i + 1 :]) for i in (0, ROOTS - 1)},
    }


def test_wrong_proofs_are_refused(issuer: Issuer, other: Issuer) -> None:
    for proof in wrong_proofs(issuer, other).values():
        with pytest.raises(IssuerKeyError, match=r"the key is refused: .*(root|roots)"):
            IssuerKey(issuer.key.n, proof)
        with pytest.raises(IssuerKeyError):
            IssuerKey.from_jwk({**issuer.key.to_jwk(), PROOF: texts(proof, width(issuer.key.n))})


def texts(proof: tuple[int, ...], length: int) -> list[str]:
    return [encode(root.to_bytes(max(length, (root.bit_length() + 7) // 8), "big")) for root in proof]


def root_of(r: int, prime: int) -> int:
    """Returns an e-th root of r modulo a prime that is 1 modulo e but not 1 modulo e^2, if r is an e-th power."""
    rest = (prime - 1) // E
    return pow(r, pow(E, -1, rest), prime)


def signatures(p: int, q: int, encoding: int, count: int) -> list[int]:
    """Returns `count` different e-th roots of an encoding that is an e-th power modulo p: there are 65,537."""
    unity = next(z for g in range(2, 100) if (z := pow(g, (p - 1) // E, p)) != 1)
    modulo_p, modulo_q = root_of(encoding % p, p), pow(encoding % q, pow(E, -1, q - 1), q)
    found = []
    for _ in range(count):
        found.append(modulo_q + q * ((modulo_p - modulo_q) * pow(q, -1, p) % p))
        modulo_p = modulo_p * unity % p
    return found


def test_a_dishonest_key_has_many_valid_signatures_of_one_message() -> None:
    """1,024 bits. The cryptographic library accepts all of them, and each is another seed."""
    p, q = P_512, Q_512
    n = p * q
    assert probably_prime(p)
    assert probably_prime(q)
    assert (p % E, math.gcd(E, q - 1), n.bit_length(), (p - 1) // E % E != 0) == (1, 1, 1024, True)
    library = rsa.RSAPublicNumbers(E, n).public_key()
    seeds = set()
    for s in signatures(p, q, int.from_bytes(encoded(MESSAGE, 128), "big"), 500):
        signature = s.to_bytes(128, "big")
        library.verify(signature, MESSAGE, padding.PKCS1v15(), hashes.SHA256())
        assert accepts(n, MESSAGE, signature)
        seeds.add(seed_of(signature))
    assert len(seeds) == 500


@pytest.mark.parametrize(("p", "q"), [(P_512, Q_512), (P_1536, Q_1536)], ids=["1024 bits", "3072 bits"])
def test_a_dishonest_key_is_refused_and_no_proof_of_it_can_be_forged(p: int, q: int, issuer: Issuer) -> None:
    """Its holder knows p and q, and still has no root to give: the challenges are no e-th powers modulo p."""
    n = p * q
    assert probably_prime(p)
    assert probably_prime(q)
    with pytest.raises(IssuerKeyError, match="no permutation proof"):
        prove(p, q)
    assert all(pow(r, (p - 1) // E, p) != 1 for r in challenges(n))
    rest = (p - 1) // E
    best_p = [pow(r % p, pow(E * n, -1, rest), p) for r in challenges(n)]
    best_q = [pow(r % q, pow(E * n, -1, q - 1), q) for r in challenges(n)]
    inverse = pow(q, -1, p)
    best = tuple(b + q * ((a - b) * inverse % p) for a, b in zip(best_p, best_q, strict=True))
    assert [pow(root, E * n, q) for root in best] == [r % q for r in challenges(n)]  # right modulo q
    for forged in (best, issuer.key.proof, tuple(challenges(n)), (1,) * ROOTS, ()):
        assert fault(n, forged) is not None


def test_a_dishonest_key_of_full_length_is_refused_wherever_it_is_read(issuer: Issuer) -> None:
    n = P_1536 * Q_1536
    assert n.bit_length() == 3072
    without: dict[str, Any] = {**jwk_of(n, issuer.key.proof, False)}
    del without[PROOF]
    with pytest.raises(IssuerKeyError, match="no permutation proof"):
        IssuerKey.from_jwk(without)
    roots = [encode((root % n).to_bytes(384, "big")) for root in issuer.key.proof]
    with pytest.raises(IssuerKeyError, match="another key's, or the key is dishonest"):
        IssuerKey.from_jwk({**without, PROOF: roots})


def test_the_factor_n_in_the_exponent_refuses_moduli_that_are_not_squarefree() -> None:
    """gcd(e, phi(n)) = 1 for n = p p q, so that e-th roots exist; but x -> x^e is no permutation of all residues."""
    p, q = Q_512, next(x for x in range(2**512 + 1, 2**513, 2) if x % E != 1 and probably_prime(x))
    n = p * p * q
    assert math.gcd(E, p * (p - 1) * (q - 1)) == 1
    assert pow(p * q, E, n) == pow(2 * p * q, E, n) == 0
    d = pow(E, -1, p * (p - 1) * (q - 1))
    assert all(pow(pow(r, d, n), E, n) == r for r in challenges(n))  # the proof without the factor n would hold
    assert all(pow(r, (p - 1) * (q - 1), n) != 1 for r in challenges(n))  # no p-th powers, so no n-th powers
    assert fault(n, tuple(pow(r, d, n) for r in challenges(n))) is not None


@pytest.mark.parametrize("factor", [2, 3, 257, 65521, 65537])
def test_small_factors_are_refused(factor: int, issuer: Issuer) -> None:
    n = factor * (2**3072 // factor | 1)
    n += 0 if n.bit_length() == 3072 else -2 * factor
    assert n.bit_length() == 3072
    with pytest.raises(IssuerKeyError, match="small factor"):
        IssuerKey(n, issuer.key.proof)


def test_the_next_prime_is_no_small_factor() -> None:
    """65,539 exceeds e, so that the proof of roots covers it."""
    p, q = 65539, Q_1536
    assert fault(p * q, prove(p, q)) is None
    assert fault(p * q, (1,) * ROOTS) is not None


@pytest.mark.parametrize("bits", [512, 1024, 2048, 3071, 4097, 8192])
def test_keys_of_other_lengths_are_refused(bits: int, issuer: Issuer) -> None:
    with pytest.raises(IssuerKeyError, match=f"3072 to 4096 bits, not {bits}"):
        IssuerKey(2**bits - 1, issuer.key.proof)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kty", "EC"),
        ("kty", "oct"),
        ("e", "Aw"),
        ("e", "AAEAAQ"),
        ("e", "AQAC"),
        ("alg", "HS256"),
        ("alg", "none"),
        ("use", "enc"),
    ],
)
def test_keys_of_another_kind_or_exponent_are_refused(name: str, value: str, issuer: Issuer) -> None:
    with pytest.raises(IssuerKeyError, match=f'must have "{name}"'):
        IssuerKey.from_jwk({**issuer.key.to_jwk(), name: value})
    jwk = issuer.key.to_jwk()
    del jwk[name]
    with pytest.raises(IssuerKeyError, match=f'must have "{name}"'):
        IssuerKey.from_jwk(jwk)


def test_the_modulus_has_one_text(issuer: Issuer) -> None:
    jwk = issuer.key.to_jwk()
    padded = encode(b"\0" + issuer.key.n.to_bytes(384, "big"))
    for text in (padded, jwk["n"] + "=", "", encode_integer(issuer.key.n + 2)):
        with pytest.raises(IssuerKeyError):
            IssuerKey.from_jwk({**jwk, "n": text})
    assert IssuerKey.from_jwk(jwk) == issuer.key
    assert thumbprint(issuer.key.n) == thumbprint(IssuerKey.from_jwk(jwk).n)
