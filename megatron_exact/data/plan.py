"""What a plan is: which piece of which document fills which row of one split.

Plans are streams of blocks, never whole arrays: a corpus of a billion documents is planned in the memory
of its lengths and a permutation's worth of document numbers. Documents of all sources are numbered
through, source after source (`DocumentPool`); only what is written names source and document again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.manifest import TokenPlace
from megatron_exact.data.shuffle import KeyedPermutation

BLOCK_DOCUMENTS = 1 << 17  # documents, or segments, of one block: a few megabytes of temporaries


@dataclass(frozen=True, kw_only=True)
class DocumentPool:
    """The documents of all sources of a pack, numbered through."""

    tokens: NDArray[np.integer]
    """int32 or int64 [documents], length of each; 0 for one that no split takes."""
    first: NDArray[np.int64]
    """[sources + 1], number of the first document of each source; the last is the number of all."""
    first_target: NDArray[np.int32] | None = None
    """[documents], token that is each document's first supervised target; None: every one is."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, number: NDArray[np.integer]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Source, and document number inside it, of documents of the pool: both [n]."""
        if self.first.size == 2:
            return np.zeros(number.size, dtype=np.uint16), number.astype(np.int64, copy=False)
        source = np.searchsorted(self.first, number, side="right") - 1
        return source.astype(np.uint16), number - self.first[source]


def number_dtype(documents: int) -> type[np.unsignedinteger]:
    """dtype that holds the numbers of that many documents: half the memory up to four billion."""
    return np.uint32 if documents <= 1 << 32 else np.uint64


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Which of the chosen documents were taken in which pass over their source."""

    ends: NDArray[np.int64]
    """[parts], where in `ChosenDocuments.numbers` each part ends; a part holds no document twice."""
    number: NDArray[np.int64]
    """[parts], 0 for the first pass over a source."""

    @property
    def most(self) -> int:
        """How often a document was taken at most."""
        return int(self.number.max()) + 1

    def of(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """The pass in which the documents at these positions were taken, [n]."""
        return self.number[np.searchsorted(self.ends, positions, side="right")]


@dataclass(frozen=True, kw_only=True)
class ChosenDocuments:
    """The documents of one split and their order; a repeated document is in it several times."""

    pool: DocumentPool
    """Where the numbers point."""
    numbers: NDArray[np.unsignedinteger] | None
    """[chosen], in any order; None means every document of the pool, once."""
    key: int | None
    """Of the permutation that orders them; None leaves them as they stand."""
    passes: Passes | None = None
    """Tells copies of a document apart; None where no document is repeated."""

    def __len__(self) -> int:
        return len(self.pool) if self.numbers is None else self.numbers.size

    def as_they_stand(self) -> Iterator[NDArray[np.integer]]:
        """Lengths, block by block, in no particular order: the fast way to sums and histograms."""
        for first in range(0, len(self), BLOCK_DOCUMENTS):
            if self.numbers is None:
                yield self.pool.tokens[first : first + BLOCK_DOCUMENTS]
            else:
                yield self.pool.tokens[self.numbers[first : first + BLOCK_DOCUMENTS]]

    def in_order(self) -> Iterator[tuple[NDArray[np.integer], NDArray[np.integer]]]:
        """(numbers, lengths), block by block, in the shuffled order of packing."""
        for numbers, tokens, _ in self.in_order_with_positions():
            yield numbers, tokens

    def in_order_with_positions(
        self,
    ) -> Iterator[tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.int64]]]:
        """The same, and where each document stands in `numbers`, which `passes` asks for."""
        for positions in self._positions():
            numbers = positions if self.numbers is None else self.numbers[positions]
            yield numbers, self.pool.tokens[numbers], positions

    def _positions(self) -> Iterator[NDArray[np.int64]]:
        if self.key is not None:
            yield from KeyedPermutation(len(self), self.key).blocks(BLOCK_DOCUMENTS)
            return
        for first in range(0, len(self), BLOCK_DOCUMENTS):
            yield np.arange(first, min(first + BLOCK_DOCUMENTS, len(self)))


@dataclass(frozen=True, kw_only=True)
class PlanBlock:
    """Consecutive segments of a plan; a row may begin in one block and end in the next."""

    number: NDArray[np.integer]
    """[segments], the document's number in the pool."""
    start: NDArray[np.int64]
    """[segments], token offset inside the document."""
    tokens: NDArray[np.int32]
    """[segments], >= 1."""
    goes_on: NDArray[np.bool_]
    """[segments], whether its document has tokens after it."""
    ends_row: NDArray[np.bool_]
    """[segments], whether it is its row's last."""


class Plan(Protocol):
    """Rows of one split, ready to be read as often as needed; the same blocks each time."""

    pool: DocumentPool
    row_tokens: int
    rows: int
    left_out_tokens: int
    """Tokens of the chosen documents that are no input of any row."""
    next_token: TokenPlace | None
    """The token after the last row's last input where the stream goes on there, else None. Known once
    `blocks` was read to its end."""

    def blocks(self) -> Iterator[PlanBlock]:
        """All segments, row after row."""
        ...
