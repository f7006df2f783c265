"""Our own counter-based randomness: the same stream on every machine and with every numpy.

`random_bits(key, counter)` is output number `counter` of SplitMix64 (Steele, Lea and Flood 2014) seeded
with `key`. It is integer arithmetic modulo 2^64 alone, so any element is available without its
predecessors. `KeyedPermutation` shuffles [0, n) the same way: it is a Feistel network over H x 2^j cells,
j about half the bits of n and H = ceil(n / 2^j) (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains"); a value outside [0, n), of which there are few, passes through the network again. It needs no
array of n numbers: position i is computed alone, in O(1), so that a run can resume in the middle of an
epoch and a corpus larger than memory can be packed.

Golden values in the tests freeze both, since a change here would change every packed stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
ROUND_MULTIPLIERS = {32: (0x9E3779B1, 0x85EBCA6B), 64: (GAMMA, MULTIPLIER_2)}  # odd, bits well mixed
ROUNDS = 8  # twice the four that Luby and Rackoff's proof needs
ROUNDS_OF_FEW = 24  # halves of few values mix slowly; measured in the tests
FEW = 1 << 12
BLOCK = 1 << 14  # positions handled at once, so that the temporaries stay in the processor's cache
SMALL_DOMAIN = 1 << 32  # up to here words of 32 bits do, at a fraction of the time
MAX_DOMAIN = 1 << 62


def derive_key(*parts: int | str) -> int:
    """Derive a 64-bit key for one purpose from words and whole numbers.

    It is the first 8 bytes, big-endian, of the sha256 of the parts joined by newlines, each with its type,
    so that ("a", 1) and ("a", "1") differ. Example: `derive_key("row order", seed, epoch)`.
    """
    text = "\n".join(f"{type(part).__name__} {part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def random_bits(key: int, counter: ArrayLike) -> NDArray[np.uint64]:
    """Return 64 random bits for each counter, distinct for distinct counters of one key.

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
    state ^= state >> np.uint64(30)
    state *= np.uint64(MULTIPLIER_1)
    state ^= state >> np.uint64(27)
    state *= np.uint64(MULTIPLIER_2)
    state ^= state >> np.uint64(31)
    return state


class KeyedPermutation:
    """A bijection of [0, size) chosen by `key`, with random access.

    Position x = left 2^j + right; even rounds do `right = (right + F(left)) mod 2^j`, odd rounds
    `left = (left + F(right)) mod H`, each with a round key from `random_bits`.

    Attributes:
        size: number of elements, in [0, 2^62].
        key: in [0, 2^64).
    """

    def __init__(self, size: int, key: int) -> None:
        if not 0 <= size <= MAX_DOMAIN:
            raise ValueError(f"a permutation of {size} elements: it must lie in [0, 2^62]")
        self.size = size
        self.key = key
        self._word_bits = 32 if size <= SMALL_DOMAIN else 64
        self._right_bits = max(1, ((max(size, 1) - 1).bit_length() + 1) // 2)
        self._left_size = max(1, -(-size >> self._right_bits))  # at most 2^right_bits
        rounds = ROUNDS if size >= FEW else ROUNDS_OF_FEW
        keys = random_bits(key, np.arange(rounds)) >> np.uint64(64 - self._word_bits)
        self._round_keys = [int(bits) for bits in keys]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """Return the element at one position, in plain Python integers (about 10 microseconds)."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is not in [0, {self.size})")
        value = position
        while True:
            value = self._encrypt_one(value)
            if value < self.size:
                return value

    def _encrypt_one(self, value: int) -> int:
        word, half = self._word_bits, self._word_bits // 2
        mask, (first, second) = (1 << word) - 1, ROUND_MULTIPLIERS[word]
        left, right = value >> self._right_bits, value & ((1 << self._right_bits) - 1)
        for index, round_key in enumerate(self._round_keys):
            bits = ((left if index % 2 == 0 else right) * first + round_key) & mask
            bits = ((bits ^ (bits >> (half - 1))) * second) & mask
            if index % 2 == 0:
                right = (right + (bits >> (word - self._right_bits))) & ((1 << self._right_bits) - 1)
            else:
                left = (left + (((bits >> half) * self._left_size) >> half)) % self._left_size
        return (left << self._right_bits) | right

    def take(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Return the elements at many positions.

        Args:
            positions: integers [n] in [0, size).

        Returns:
            int64 [n].
        """
        where = np.asarray(positions)
        out = np.empty(where.shape, dtype=np.int64)
        for start in range(0, where.size, BLOCK):
            out[start : start + BLOCK] = self._take_block(where[start : start + BLOCK])
        return out

    def all(self) -> NDArray[np.int64]:
        """Return the whole permutation: int64 [size]."""
        return self.part(0, self.size)

    def part(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the elements at positions [first, stop): int64 [stop - first]."""
        out = np.empty(stop - first, dtype=np.int64)
        for start in range(first, stop, BLOCK):
            end = min(start + BLOCK, stop)
            out[start - first : end - first] = self._take_block(np.arange(start, end))
        return out

    def blocks(self, length: int) -> Iterator[NDArray[np.int64]]:
        """Yield the whole permutation in pieces of `length` elements; the last may be shorter."""
        for first in range(0, self.size, length):
            yield self.part(first, min(first + length, self.size))

    def _take_block(self, positions: NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
        dtype = np.uint32 if self._word_bits == 32 else np.uint64
        values = self._encrypt(positions.astype(dtype))
        size = dtype(self.size) if self.size < SMALL_DOMAIN or self._word_bits == 64 else None
        if size is None:  # exactly 2^32 elements: no word lies outside
            return values
        outside = np.flatnonzero(values >= size)
        while outside.size:  # cycle walking: at most about sqrt(size) of size + sqrt(size) values
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= size]
        return values

    def _encrypt(self, values: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        """Apply the network once; may overwrite its argument."""
        dtype = values.dtype.type
        half, first, second = (
            dtype(number) for number in (self._word_bits // 2, *ROUND_MULTIPLIERS[self._word_bits])
        )
        unused = dtype(self._word_bits - self._right_bits)
        size = dtype(self._left_size)
        left = values >> dtype(self._right_bits)
        right_mask = dtype((1 << self._right_bits) - 1)
        right = np.bitwise_and(values, right_mask, out=values)
        bits, shifted = np.empty_like(left), np.empty_like(left)
        for index, round_key in enumerate(self._round_keys):
            np.multiply(left if index % 2 == 0 else right, first, out=bits)
            bits += dtype(round_key)
            np.right_shift(bits, half - dtype(1), out=shifted)
            bits ^= shifted
            bits *= second
            if index % 2 == 0:
                bits >>= unused
                right += bits
                right &= right_mask
            else:
                bits >>= half
                bits *= size
                bits >>= half
                left += bits
                np.subtract(left, size, out=shifted)  # wraps around where left < size
                np.minimum(left, shifted, out=left)
        left <<= dtype(self._right_bits)
        left |= right
        return left


def row_permutation(rows: int, seed: int, epoch: int) -> KeyedPermutation:
    """Return the order in which training reads the rows of a pack in one epoch."""
    return KeyedPermutation(rows, derive_key("row order", seed, epoch))
