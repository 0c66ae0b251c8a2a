"""The proof that an RSA key gives each message exactly one signature.

A dishonest key can give a message many signatures. If a prime factor of n is 1 modulo e, every message that has a
signature has at least e of them, and the issuer could choose among e noise seeds. The proof excludes such keys. It is
the one of Goldberg, Reyzin, Sagga and Baldimtsi, "Certifying RSA Public Keys with an Efficient NIZK" (ePrint 2018/057;
revised as "Efficient Noninteractive Certification of RSA Moduli and Beyond", ASIACRYPT 2019, section 3): k-th roots of
numbers that a hash function chose. With e-th roots alone the proof would cover the units modulo n; the factor n in the
exponent, as in section 3.2 of the paper, covers all integers modulo n.

Let e = 65537, which is prime, and k = e n. The proof is eight numbers s_1, ..., s_8. It is accepted if

    1. n has no prime factor up to e,
    2. s_i^k = r_i (mod n) and gcd(r_i, n) = 1 for i = 1, ..., 8, where r_i is the hash of the key and i, reduced mod n.

Theorem. (a) If gcd(k, phi(n)) = 1, then x -> x^e permutes the integers modulo n. (b) Otherwise, if 1. holds, a proof
exists with probability below 2^-128 over the choice of the hash function.

(a) If p^2 divided n for a prime p, then p would divide both n and phi(n). So n is squarefree, and the integers modulo n
are a product of fields of p elements (Chinese remainder theorem). In each of them x -> x^e is a permutation, because e
is coprime to p - 1.

(b) Let r be a prime that divides k and phi(n). Then r = e, or r divides n and exceeds e by 1.; so r >= e. The units
modulo n are a product of cyclic groups, and r divides the order of one of them. In that group one element in r is an
r-th power. Every k-th power is an r-th power, so at most phi(n)/e < n/e units are k-th powers. If r_i were uniform, it
would be a unit and a k-th power with probability below 1/e. In fact r_i is a hash at least 256 bits longer than n,
reduced modulo n; so no residue is more probable than (1 + 2^-256)/n. The eight hashes are independent, and all eight
roots exist with probability below

    ((1 + 2^-256) / 65537)^8 < 2^-128,    because 65537^8 = 2^128 (1 + 2^-16)^8 > 2^128 (1 + 2^-13).

The bound is per modulus in the random oracle model: whoever tries T moduli succeeds with probability below T 2^-128.
The proof does not show that n is hard to factor, or that the issuer keeps the key secret.
"""

from __future__ import annotations

import functools
import hashlib
import math

from macer_serve.errors import IssuerKeyError
from macer_serve.issuing.rsa import PUBLIC_EXPONENT, thumbprint, width

ROOTS = 8
_LABEL = b"macer-serve/permutation-proof/1\0"


def challenges(n: int) -> list[int]:
    """Returns the numbers r_1, ..., r_8 modulo n whose roots are the proof.

    r_i is MGF1 with SHA-256 (RFC 8017, appendix B.2.1) of the label, byte 00, the key's thumbprint and i in one byte.
    """
    seeds = [_LABEL + thumbprint(n) + bytes([i]) for i in range(1, ROOTS + 1)]
    return [int.from_bytes(_mgf1(seed, width(n) + 32), "big") % n for seed in seeds]


def _mgf1(seed: bytes, length: int) -> bytes:
    blocks = -(-length // 32)
    return b"".join(hashlib.sha256(seed + i.to_bytes(4, "big")).digest() for i in range(blocks))[:length]


def prove(p: int, q: int) -> tuple[int, ...]:
    """Returns the proof of the key with the prime factors p and q.

    Raises `IssuerKeyError` if no proof exists. Meant for the moment in which a key is made: the time that this function
    takes depends on p and q, unlike the time of the cryptographic library's signatures.
    """
    n = p * q
    try:
        root_p, root_q = (pow(PUBLIC_EXPONENT * n, -1, prime - 1) for prime in (p, q))
        inverse = pow(q, -1, p)
    except ValueError:
        raise IssuerKeyError("the key has no permutation proof: some messages would have several signatures") from None
    proof = []
    for r in challenges(n):
        modulo_p, modulo_q = pow(r % p, root_p, p), pow(r % q, root_q, q)
        proof.append(modulo_q + q * ((modulo_p - modulo_q) * inverse % p))
    return tuple(proof)


@functools.lru_cache(maxsize=64)  # one check takes eight long exponentiations, and auditors check many certificates
def fault(n: int, proof: tuple[int, ...]) -> str | None:
    """Returns what is wrong with a proof for the modulus n > 1, or None if the proof holds."""
    if (factor := math.gcd(n, _primorial())) > 1:
        return f"its modulus has a small factor: {str(factor)[:20]}"
    if len(proof) != ROOTS:
        return f"its permutation proof must have {ROOTS} roots, not {len(proof)}"
    for i, (root, challenge) in enumerate(zip(proof, challenges(n), strict=True), start=1):
        if not 0 < root < n:
            return f"root {i} of its permutation proof is not between 1 and the modulus"
        if math.gcd(challenge, n) != 1:
            return "its modulus shares a factor with a hash"
        if pow(root, PUBLIC_EXPONENT * n, n) != challenge:
            return f"root {i} of its permutation proof is wrong: the proof is another key's, or the key is dishonest"
    return None


@functools.cache
def _primorial() -> int:
    """Returns the product of the primes up to 65537."""
    sieve = bytearray([1]) * (PUBLIC_EXPONENT + 1)
    sieve[:2] = b"\0\0"
    for i in range(2, math.isqrt(PUBLIC_EXPONENT) + 1):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, PUBLIC_EXPONENT + 1, i)))
    return math.prod(i for i, prime in enumerate(sieve) if prime)
