"""Claim: the two signatures of an answer, seed proof and certificate, take at most 8 ms together.

Prints milliseconds per operation, elapsed and of processor time: medians over rounds in which the operations alternate,
for a key of 3,072 bits and a certificate of 3,000 bytes. Both signatures run without Python's global lock, so that they
can overlap with the votes of other answers. Within one answer they cannot: the votes need the seed, and the certificate
needs the votes. So the last lines give the cost of an answer: the same fixed plan of 1,000 votes on the bundled
model with both signatures, and with a seed that takes no signature.

    python benchmarks/issuing.py             # 15 rounds
    python benchmarks/issuing.py --rounds 50
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from macer_serve.issuing import Issuer, IssuerKey, KeySet, permutation
from macer_serve.smoothed import SmoothedClassifier
from macer_serve.smoothing.plan import Plan

ABOUT = {
    f"{name}_digest": "sha256:" + hashlib.sha256(name.encode()).hexdigest() for name in ("input", "model", "policy")
}
CERTIFICATE = b"x" * 3000
IMAGE = Path(__file__).resolve().parent.parent / "tests" / "images" / "0001-ship.png"
PLAN = Plan(n=1000)


def proved(key: IssuerKey) -> None:
    """Check the key's proof again, past the memory of those that held before."""
    permutation.fault.cache_clear()
    IssuerKey(key.n, key.proof)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    issuer = Issuer.new()
    proof, jws = issuer.seed_proof(**ABOUT), issuer.sign(CERTIFICATE)
    document = issuer.keys.to_json()
    keys = KeySet.read(document)
    unsigned = SmoothedClassifier.load("bundled:cifar10")
    signing = SmoothedClassifier(unsigned.config, voter=unsigned.voter, issuer=issuer)
    answers = {name: f"answer of 1,000 votes, {name}" for name in ("unsigned", "signed")}
    # Name, calls per round, operation.
    operations: list[tuple[str, int, Callable[[], object]]] = [
        ("seed proof and signed certificate", 20, lambda: (issuer.seed_proof(**ABOUT), issuer.sign(CERTIFICATE))),
        ("seed proof", 20, lambda: issuer.seed_proof(**ABOUT)),
        ("signed certificate", 20, lambda: issuer.sign(CERTIFICATE)),
        ("check of a seed proof", 50, lambda: issuer.key.seed(proof.text, **ABOUT)),
        ("check of a signed certificate", 50, lambda: keys.open(jws)),
        ("check of a key and its proof, once per process", 1, lambda: proved(issuer.key)),
        ("new key with its proof", 1, Issuer.new),
        (answers["unsigned"], 3, lambda: unsigned.certify(IMAGE, PLAN)),
        (answers["signed"], 3, lambda: signing.signed(signing.certify(IMAGE, PLAN))),
    ]
    elapsed: dict[str, list[float]] = {name: [] for name, _, _ in operations}
    processor: dict[str, list[float]] = {name: [] for name, _, _ in operations}
    for _ in range(options.rounds):
        for name, calls, operation in operations:
            began, began_processor = time.perf_counter(), time.thread_time()
            for _ in range(calls):
                operation()
            elapsed[name].append((time.perf_counter() - began) / calls * 1e3)
            processor[name].append((time.thread_time() - began_processor) / calls * 1e3)
    for name, ms in elapsed.items():
        spread = f"({min(ms):.3f} to {max(ms):.3f}, {options.rounds} rounds)"
        print(
            f"{name:48} {statistics.median(ms):9.3f} ms   {spread}   processor {statistics.median(processor[name]):.3f}"
        )
    pairs = zip(elapsed[answers["signed"]], elapsed[answers["unsigned"]], strict=True)
    costs = [signed - without for signed, without in pairs]
    print(f"{'both signatures cost an answer (paired median)':48} {statistics.median(costs):9.3f} ms")


if __name__ == "__main__":
    main()
