"""Which documents of a source are held out for validation, and which a slice of the others holds.

A document's hash depends on the run's seed, on the content of the source's index and on the document's
number, not on paths, row length, policy or the other sources: two packs of one corpus with one seed and
fraction (a short stage and a long one) hold out the same documents. A document without a token is in no
split: it is neither counted nor held out.

A slice is the same kind of choice with a hash of its own: slice I of N holds the training documents whose
hash lies in the I-th of N equal ranges. Slices of one seed are disjoint, whatever the row lengths of the
packs, and all hold out the same validation documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.plan import DocumentPool
from megatron_exact.data.shuffle import derive_key, random_bits

BLOCK_DOCUMENTS = 1 << 17
MAX_SLICES = 1 << 16
SLICE = re.compile(r"(\d{1,6})/(\d{1,6})")
TOP_BITS = 16  # of the hashes, for a first histogram


class IndexedDocuments(Protocol):
    """What a source's validation split and slices depend on."""

    @property
    def documents(self) -> int:
        """How many there are."""

    @property
    def idx_sha256(self) -> str:
        """Of the `.idx`, or of those of its shards."""


@dataclass(frozen=True, kw_only=True)
class CorpusSlice:
    """One of several disjoint parts of every source's training documents."""

    number: int
    """Which, from 1."""
    slices: int
    """How many there are."""

    @classmethod
    def parse(cls, text: str) -> CorpusSlice:
        """Read `I/N`.

        Raises:
            ValueError: something else, or a part that does not exist.
        """
        found = SLICE.fullmatch(text)
        number, slices = (int(part) for part in found.groups()) if found else (0, 0)
        if not 1 <= number <= slices <= MAX_SLICES:
            raise ValueError(
                f"--corpus-slice {text[:40]!r}: give I/N, the I-th of N parts, such as 2/3 (N at most "
                f"{MAX_SLICES})"
            )
        return cls(number=number, slices=slices)

    def __str__(self) -> str:
        return f"{self.number}/{self.slices}"

    def is_disjoint(self, other: CorpusSlice) -> bool:
        """Whether no document is in both; N may differ."""
        first, second = sorted(
            (Fraction(one.number - 1, one.slices), Fraction(one.number, one.slices))
            for one in (self, other)
        )
        return first[1] <= second[0]

    def holds(self, documents: NDArray[np.integer], *, seed: int, idx_sha256: str) -> NDArray[np.bool_]:
        """Whether each document of a source, by its number, is in this part.

        The upper 32 bits of a document's hash, as a fraction of 2^32, lie in [(I - 1) / N, I / N).

        Args:
            documents: [n], numbers inside the source.
            seed: of the pack.
            idx_sha256: of the source's `.idx`.
        """
        upper = random_bits(derive_key("corpus slice", seed, idx_sha256), documents) >> np.uint64(32)
        found: NDArray[np.uint64] = (upper * np.uint64(self.slices)) >> np.uint64(32)
        return np.equal(found, np.uint64(self.number - 1))


def hold_out(
    sources: Sequence[IndexedDocuments], pool: DocumentPool, fraction: float, *, seed: int
) -> list[NDArray[np.bool_]]:
    """Of each source, bool [documents]: whether a document is of the validation split."""
    held_out = []
    for index, source in enumerate(sources):
        is_empty = pool.tokens[int(pool.first[index]) : int(pool.first[index + 1])] == 0
        held_out.append(
            validation_documents(
                source.documents,
                fraction,
                seed=seed,
                idx_sha256=source.idx_sha256,
                is_empty=is_empty if is_empty.any() else None,
            )
        )
    return held_out


def validation_documents(
    num_documents: int,
    fraction: float,
    *,
    seed: int,
    idx_sha256: str,
    is_empty: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Mark the documents of one source that belong to the validation split.

    The `fraction * documents` documents (rounded, at least one and never all if the fraction is above 0
    and there are two) with the smallest hashes. Memory: the result and two blocks of hashes.

    Args:
        num_documents: of the source.
        fraction: in [0, 1).
        seed: of the pack.
        idx_sha256: of the source's `.idx`.
        is_empty: [documents], those without a token, which do not count; None: there are none.

    Returns:
        bool [documents].
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction {fraction} is not in [0, 1)")
    marked = np.zeros(num_documents, dtype=np.bool_)
    candidates = num_documents if is_empty is None else num_documents - int(np.count_nonzero(is_empty))
    if fraction == 0 or candidates < 2:
        return marked
    held_out = min(max(1, int(fraction * candidates + 0.5)), candidates - 1)
    key = derive_key("validation split", seed, idx_sha256)
    threshold = _smallest_hashes(num_documents, held_out, key, is_empty)
    for first, hashes in _hashes(num_documents, key):
        np.less_equal(hashes, threshold, out=marked[first : first + hashes.size])
    return marked if is_empty is None else marked & ~is_empty


def _hashes(num_documents: int, key: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    for first in range(0, num_documents, BLOCK_DOCUMENTS):
        yield first, random_bits(key, np.arange(first, min(first + BLOCK_DOCUMENTS, num_documents)))


def _smallest_hashes(
    num_documents: int, count: int, key: int, is_empty: NDArray[np.bool_] | None
) -> np.uint64:
    """The `count`-th smallest hash. Hashes of distinct documents are distinct, so exactly `count` lie at
    or below it."""

    def candidates() -> Iterator[NDArray[np.uint64]]:
        for first, hashes in _hashes(num_documents, key):
            yield hashes if is_empty is None else hashes[~is_empty[first : first + hashes.size]]

    shift = np.uint64(64 - TOP_BITS)
    histogram = np.zeros(1 << TOP_BITS, dtype=np.int64)
    for hashes in candidates():
        histogram += np.bincount((hashes >> shift).astype(np.int64), minlength=histogram.size)
    below = np.cumsum(histogram)
    top = int(np.searchsorted(below, count))  # the threshold begins with these bits
    rank = count - 1 - int(below[top] - histogram[top])
    near = np.concatenate([hashes[hashes >> shift == top] for hashes in candidates()])
    return np.uint64(np.partition(near, rank)[rank])
