"""The order of samples: a keyed permutation that is computed, never stored.

    i -> E_key(i), again while E_key(i) >= n          key = BLAKE2b(seed, epoch)

E is a balanced Feistel network over the next even power of two (Luby and Rackoff, "How to construct
pseudorandom permutations from pseudorandom functions", 1988), and repeating it until the value falls inside
[0, n) is cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), which keeps it a
bijection.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8


def permute(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation of [0, n) that belongs to (seed, epoch) sends each index: int64 to int64.

    A pure function in O(1) memory: the domain has fewer than 4n values, so that an index takes fewer than
    four walks on average.
    """
    half_bits = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    keys = _round_keys(seed, epoch)
    values = _encrypt(indices.astype(np.uint64), keys, half_bits)
    while (outside := values >= n).any():
        values[outside] = _encrypt(values[outside], keys, half_bits)
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"llmnorm order {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def _encrypt(values: np.ndarray, keys: np.ndarray, half_bits: np.uint64) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit in changes every bit out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
