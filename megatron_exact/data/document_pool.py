"""The documents of a pack: their lengths, which of them a split takes, and in which order.

The documents of all sources are numbered consecutively, source after source (`DocumentPool`). A corpus of a
billion documents has to be planned in a few gigabytes, so a length takes two bytes (`CompactLengths`), a
split that lacks few documents stores those (`NumbersWithGaps`), the order is computed
(`shuffle.KeyedPermutation`), and what has to be sorted lies in a file without a name (`scratch_array`).
"""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_exact.data.shuffle import KeyedPermutation

BLOCK_DOCUMENTS = 1 << 17  # documents, or segments, of one block: a few megabytes of temporaries
LONG_TOKENS = (1 << 16) - 1  # lengths from here on do not fit `CompactLengths`' two bytes
SCRATCH_BYTES = 8 << 20  # smaller arrays stay in memory
GAP_BITS = 7  # of the directory of `NumbersWithGaps`
MOST_STEPS = 8  # from a number of the directory; beyond it a search is faster


class CompactLengths:
    """Lengths of documents in two bytes each, read like an array; the few longer ones stand apart.

    Attributes:
        size: number of documents.
        dtype: dtype of what is read: int64 if one of the blocks is, else int32.

    Args:
        blocks: lengths of at least 0, in order.
        size: number of all documents.
    """

    def __init__(self, blocks: Iterable[NDArray[np.integer]], size: int) -> None:
        self.size = size
        self.dtype: np.dtype[np.integer] = np.dtype(np.int32)
        self._short = np.empty(size, np.uint16)
        places, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        done = 0
        for block in blocks:
            if block.dtype.itemsize > self.dtype.itemsize:
                self.dtype = np.dtype(np.int64)
            long = np.flatnonzero(block >= LONG_TOKENS)
            mine = self._short[done : done + block.size]
            np.copyto(mine, block, casting="unsafe")
            mine[long] = LONG_TOKENS
            places.append(long + done)
            values.append(block[long].astype(np.int64))
            done += block.size
        assert done == size, "every document has a length"
        self._long_places, self._long_values = np.concatenate(places), np.concatenate(values)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice | int | NDArray[np.integer]) -> NDArray[np.integer]:
        found = self._short[where].astype(self.dtype)
        long = np.flatnonzero(found == LONG_TOKENS)
        if long.size:
            if isinstance(where, slice):
                places = range(*where.indices(self.size))
                where = np.arange(places.start, places.stop, places.step)
            numbers = np.atleast_1d(where)[long]
            values = self._long_values[np.searchsorted(self._long_places, numbers)]
            if not found.ndim:
                one: NDArray[np.integer] = values.astype(self.dtype)[0]
                return one
            found[long] = values
        return found

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)


def scratch_array(size: int, dtype: DTypeLike, folder: Path | None) -> np.ndarray:
    """Return an array [size] for intermediate results, of undefined content.

    A large one is mapped from a file in `folder` that has no name, so nothing is left of it when the
    process ends, however it does. Its pages are the kernel's cache: they are written out when memory is
    short, where an array in memory would end the process. Without a folder, or where the file cannot be
    made (no room, no permission; a warning says so), the array is in memory.
    """
    dtype = np.dtype(dtype)
    num_bytes = size * dtype.itemsize
    if folder is None or num_bytes < SCRATCH_BYTES:
        return np.empty(size, dtype)
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            os.posix_fallocate(stream.fileno(), 0, num_bytes)  # a full disk would be a SIGBUS later
            return np.frombuffer(mmap.mmap(stream.fileno(), num_bytes), dtype)
    except OSError as error:
        warnings.warn(
            f"{folder} cannot have a scratch file of {num_bytes:,} bytes ({error.strerror}): as many bytes "
            "of memory are used",
            stacklevel=2,
        )
    return np.empty(size, dtype)


@dataclass(frozen=True, kw_only=True)
class DocumentPool:
    """The documents of all sources of a pack, numbered consecutively."""

    tokens: NDArray[np.integer] | CompactLengths
    """int32 or int64 [documents], length of each; 0 for an empty document, which is in no split."""
    first: NDArray[np.int64]
    """[sources + 1], number of the first document of each source; the last is the number of all."""
    first_target: NDArray[np.int32] | None = None
    """[documents], each document's first supervised token; None where all tokens are supervised."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def lengths_of(self, source: int) -> Iterator[NDArray[np.integer]]:
        """Yield the lengths of the documents of one source, in blocks."""
        start, stop = int(self.first[source]), int(self.first[source + 1])
        for first in range(start, stop, BLOCK_DOCUMENTS):
            yield self.tokens[first : min(first + BLOCK_DOCUMENTS, stop)]

    def blocks(self) -> Iterator[NDArray[np.integer]]:
        """Yield the lengths of all documents, in blocks."""
        for source in range(self.first.size - 1):
            yield from self.lengths_of(source)

    def total_tokens(self) -> int:
        """Return the tokens of all documents."""
        return sum(int(lengths.sum(dtype=np.int64)) for lengths in self.blocks())

    def locate(self, number: NDArray[np.integer]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Return source, and document number inside it, of documents of the pool: both [n]."""
        if self.first.size == 2:
            return np.zeros(number.size, dtype=np.uint16), number.astype(np.int64, copy=False)
        source = np.searchsorted(self.first, number, side="right") - 1
        return source.astype(np.uint16), number - self.first[source]


def number_dtype(documents: int) -> type[np.unsignedinteger]:
    """Return the dtype for the numbers of that many documents: half the memory up to four billion."""
    return np.uint32 if documents <= 1 << 32 else np.uint64


class NumbersWithGaps:
    """Ascending document numbers of which few are missing: indexed like an array, in 3% of its memory.

    The k-th number is `first + k + g`, where g of the missing numbers come before it. With the i-th missing
    number at `first + missing[i]`, g is how many of `missing[i] - i` are at most k. A directory gives g at
    every 128th k, and the few that follow are counted one by one.

    Args:
        first: smallest number, if it is not missing.
        documents: numbers with the missing ones.
        missing: [missing], ascending, those that are left out, counted from `first`.
        dtype: of the numbers.
    """

    def __init__(
        self, first: int, documents: int, missing: NDArray[np.integer], dtype: type[np.unsignedinteger]
    ) -> None:
        self.size = documents - missing.size
        self._first = first
        self._dtype = dtype
        self._places = np.full(missing.size + 1, np.iinfo(dtype).max, dtype)  # the last is beyond every k
        self._places[:-1] = missing - np.arange(missing.size)
        starts = np.arange(0, self.size + 1, 1 << GAP_BITS)
        self._before = np.searchsorted(self._places[:-1], starts).astype(dtype)

    def __getitem__(self, where: slice | NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
        if isinstance(where, slice):
            where = np.arange(*where.indices(self.size))
        gaps = self._before[where >> GAP_BITS].astype(np.int64)
        behind = np.flatnonzero(self._places[gaps] <= where)
        for _ in range(MOST_STEPS):
            if not behind.size:
                break
            gaps[behind] += 1
            behind = behind[self._places[gaps[behind]] <= where[behind]]
        if behind.size:  # many missing numbers in a row
            gaps[behind] = np.searchsorted(self._places[:-1], where[behind], side="right")
        numbers: NDArray[np.unsignedinteger] = (where + gaps + self._first).astype(self._dtype)
        return numbers

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        numbers = np.empty(self.size, self._dtype if dtype is None else dtype)
        for first in range(0, self.size, BLOCK_DOCUMENTS):
            numbers[first : first + BLOCK_DOCUMENTS] = self[first : first + BLOCK_DOCUMENTS]
        return numbers


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Which of the chosen documents were taken in which pass over their source."""

    ends: NDArray[np.int64]
    """[parts], where in `ChosenDocuments.numbers` each part ends; a part contains no document twice."""
    number: NDArray[np.int64]
    """[parts], 0 for the first pass over a source."""

    @property
    def most(self) -> int:
        """Most times that a document was taken."""
        return int(self.number.max()) + 1

    def of(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the pass in which the documents at these positions were taken, [n]."""
        return self.number[np.searchsorted(self.ends, positions, side="right")]


@dataclass(frozen=True, kw_only=True)
class ChosenDocuments:
    """The documents of one split and their order; a repeated document occurs several times."""

    pool: DocumentPool
    """Pool to which the numbers refer."""
    numbers: NDArray[np.unsignedinteger] | NumbersWithGaps | None
    """[chosen], in any order; None means every document of the pool, once."""
    key: int | None
    """Key of the permutation that orders them; None keeps them in their order."""
    passes: Passes | None = None
    """Passes over the sources, which distinguish copies of a document; None where there are no copies."""

    def __len__(self) -> int:
        return len(self.pool) if self.numbers is None else self.numbers.size

    def as_they_stand(self) -> Iterator[NDArray[np.integer]]:
        """Yield lengths, block by block, in any order: the fast way to sums and histograms."""
        for first in range(0, len(self), BLOCK_DOCUMENTS):
            if self.numbers is None:
                yield self.pool.tokens[first : first + BLOCK_DOCUMENTS]
            else:
                yield self.pool.tokens[self.numbers[first : first + BLOCK_DOCUMENTS]]

    def in_order(self) -> Iterator[tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.int64]]]:
        """Yield (numbers, lengths, positions), block by block, in the shuffled order of packing.

        Positions say where each document stands in `numbers`, which `passes` asks for.
        """
        for positions in self._positions():
            numbers = positions if self.numbers is None else self.numbers[positions]
            yield numbers, self.pool.tokens[numbers], positions

    def _positions(self) -> Iterator[NDArray[np.int64]]:
        if self.key is not None:
            yield from KeyedPermutation(len(self), self.key).blocks(BLOCK_DOCUMENTS)
            return
        for first in range(0, len(self), BLOCK_DOCUMENTS):
            yield np.arange(first, min(first + BLOCK_DOCUMENTS, len(self)))
