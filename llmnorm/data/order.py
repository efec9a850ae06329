"""The order of samples: a keyed permutation that is computed, never stored.

    i = l * b + r      ROUNDS / 2 times: l <- (l + F_k(r)) mod a, r <- (r + F_k'(l)) mod b      until i < n

a generalized Feistel network on Z_a x Z_b with cycle walking (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). With a = ceil(sqrt(n)) and b = ceil(n / a) the domain is hardly larger than n, so that
walks are rare. Four rounds make such a network pseudorandom (Luby and Rackoff, 1988); there are six.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

ROUNDS = 6


def permute(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation of [0, n) that belongs to (seed, epoch) sends each index: int64 to int64.

    A pure function in O(1) memory and time.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    digest = hashlib.blake2b(f"llmnorm order {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8")
    values = _encrypt(indices.astype(np.uint64), keys, np.uint64(a), np.uint64(b))
    while (outside := values >= n).any():
        values[outside] = _encrypt(values[outside], keys, np.uint64(a), np.uint64(b))
    return values.astype(np.int64)


def keyed_uniform(indices: np.ndarray, key: str) -> np.ndarray:
    """A uniform number in (0, 1) for each index, a pure function of (key, index): int64 to float64."""
    start = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8).digest(), "<u8")
    bits = _mix(_mix(indices.astype(np.uint64) + start))
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _encrypt(values: np.ndarray, keys: np.ndarray, a: np.uint64, b: np.uint64) -> np.ndarray:
    left, right = np.divmod(values, b)
    for key, other in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right + key) % a) % a
        right = (right + _mix(left + other) % b) % b
    return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit in changes every bit out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
