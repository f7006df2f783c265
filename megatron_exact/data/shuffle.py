"""Our own counter-based randomness: the same stream on every machine and with every numpy.

`random_bits(key, counter)` is output number `counter` of SplitMix64 (Steele, Lea and Flood 2014) seeded
with `key`: integer arithmetic modulo 2^64 and nothing else, so any element is available without its
predecessors. `KeyedPermutation` shuffles [0, n) the same way: it is a Feistel network over
Z_a x Z_b with a, b about sqrt(n) (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), whose
few values outside [0, n) are walked on. It needs no array of n numbers: position i is computed alone,
in O(1), which is what resuming a run in the middle of an epoch needs.

Golden values in the tests freeze both: a change here would change every stream ever packed.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

MASK_64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
ROUNDS = 8  # twice the four that Luby and Rackoff's proof needs, because halves can be tiny
BLOCK = 1 << 16  # positions handled at once, so that the temporaries stay in the processor's cache
MAX_DOMAIN = 1 << 62


def derive_key(*parts: int | str) -> int:
    """A 64-bit key for one purpose, from words and whole numbers.

    The first 8 bytes, big-endian, of the sha256 of the parts joined by newlines, each with its type, so
    that ("a", 1) and ("a", "1") differ. Example: `derive_key("row order", seed, epoch)`.
    """
    text = "\n".join(f"{type(part).__name__} {part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def random_bits(key: int, counter: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each counter, distinct for distinct counters of one key.

    Args:
        key: in [0, 2^64).
        counter: integers in [0, 2^63), any shape.

    Returns:
        uint64, same shape.
    """
    state = np.asarray(counter).astype(np.uint64)  # a copy, changed in place below
    state += np.uint64(1)
    state *= np.uint64(GAMMA)
    state += np.uint64(key)
    return _finalise(state)


def _finalise(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's bijection of 64-bit words; changes and returns its argument."""
    state ^= state >> np.uint64(30)
    state *= np.uint64(MULTIPLIER_1)
    state ^= state >> np.uint64(27)
    state *= np.uint64(MULTIPLIER_2)
    state ^= state >> np.uint64(31)
    return state


class KeyedPermutation:
    """A bijection of [0, size) chosen by `key`, with random access.

    Attributes:
        size: number of elements, in [0, 2^62].
        key: in [0, 2^64).
    """

    def __init__(self, size: int, key: int) -> None:
        if not 0 <= size <= MAX_DOMAIN:
            raise ValueError(f"a permutation of {size} elements: it must lie in [0, 2^62]")
        self.size = size
        self.key = key
        self._left_size = math.isqrt(size - 1) + 1 if size else 1  # ceil(sqrt(size))
        self._right_size = -(-size // self._left_size) if size else 1
        self._round_keys = [int(bits) for bits in random_bits(key, np.arange(ROUNDS))]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """Element at one position, in plain Python whole numbers (about 10 microseconds)."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is not in [0, {self.size})")
        value = position
        while True:
            value = self._encrypt_one(value)
            if value < self.size:
                return value

    def _encrypt_one(self, value: int) -> int:
        left, right = divmod(value, self._right_size)
        for index, round_key in enumerate(self._round_keys):
            half, modulus = (right, self._left_size) if index % 2 == 0 else (left, self._right_size)
            bits = (half * GAMMA + round_key) & MASK_64
            bits = ((bits ^ (bits >> 30)) * MULTIPLIER_1) & MASK_64
            bits = ((bits ^ (bits >> 27)) * MULTIPLIER_2) & MASK_64
            shift = ((bits >> 32) * modulus) >> 32
            if index % 2 == 0:
                left = (left + shift) % modulus
            else:
                right = (right + shift) % modulus
        return left * self._right_size + right

    def take(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Elements at many positions.

        Args:
            positions: integers [n] in [0, size).

        Returns:
            int64 [n].
        """
        where = np.asarray(positions)
        out = np.empty(where.shape, dtype=np.int64)
        for start in range(0, where.size, BLOCK):
            out[start : start + BLOCK] = self._take_block(where[start : start + BLOCK].astype(np.uint64))
        return out

    def all(self) -> NDArray[np.int64]:
        """The whole permutation: int64 [size]."""
        out = np.empty(self.size, dtype=np.int64)
        for start in range(0, self.size, BLOCK):
            stop = min(start + BLOCK, self.size)
            out[start:stop] = self._take_block(np.arange(start, stop, dtype=np.uint64))
        return out

    def _take_block(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        size = np.uint64(self.size)
        values = self._encrypt(values)
        outside = np.flatnonzero(values >= size)
        while outside.size:  # cycle walking: at most about sqrt(size) of size + sqrt(size) values
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= size]
        return values

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(values, np.uint64(self._right_size))
        for index, round_key in enumerate(self._round_keys):
            if index % 2 == 0:
                _add_round(left, right, self._left_size, round_key)
            else:
                _add_round(right, left, self._right_size, round_key)
        return np.asarray(left * np.uint64(self._right_size) + right)


def _add_round(target: NDArray[np.uint64], other: NDArray[np.uint64], modulus: int, round_key: int) -> None:
    """target = (target + F(other)) mod modulus, in place, F keyed and uniform on [0, modulus)."""
    bits = other * np.uint64(GAMMA)
    bits += np.uint64(round_key)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(MULTIPLIER_1)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(MULTIPLIER_2)
    bits >>= np.uint64(32)
    bits *= np.uint64(modulus)
    bits >>= np.uint64(32)
    target += bits
    target -= np.where(target >= np.uint64(modulus), np.uint64(modulus), np.uint64(0))
